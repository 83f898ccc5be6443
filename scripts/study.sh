#!/usr/bin/env bash
# Trains the models of RescaleViT's study on a dataset, then writes tables and
# figures: see rescalevit_jax.report.study.
#
# Usage: [WEIGHTS=DIR] bash scripts/study.sh DATASET [FLAG]...
#
# WEIGHTS is the folder of Google's ImageNet-21k files ViT-B_16.npz,
# ViT-B_32.npz, ViT-L_32.npz and ViT-L_16.npz (default: weights/). An empty
# WEIGHTS leaves out the pretrained runs. Flags: --minutes=60, --jobs=4,
# --dry_run, --grid seed=0,1,2, --config.dtype=bfloat16, --models=ViT-B_32.
# Runs are written to runs/DATASET/ or to --runs_dir.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
dataset="${1:?usage: bash scripts/study.sh DATASET [FLAG]...}"
if [[ $root == *:* ]]; then
  echo "error: $root: a config's path must not contain ':'; move this checkout" >&2
  exit 1
fi

bash "$root/scripts/env.sh"
exec "$root/.venv/bin/python" -m rescalevit_jax.report.study \
  --dataset="$dataset" --weights="${WEIGHTS-weights}" "${@:2}"
