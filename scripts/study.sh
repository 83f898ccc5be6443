#!/usr/bin/env bash
# Trains the models of RescaleViT's study on a dataset: ViT-B_16, B_32, L_32 and
# L_16, each with LN from pretrained weights, then with LN, BN, GN and Rescale
# from scratch.
#
# Usage: [WEIGHTS=DIR] bash scripts/study.sh DATASET [FLAG]...
#
# Flags are passed to rescalevit_jax.sweep: --dry_run, --jobs=4,
# --grid seed=0,1,2, --config.dtype=bfloat16. WEIGHTS is the folder of Google's
# ImageNet-21k files ViT-B_16.npz, ViT-B_32.npz, ViT-L_32.npz and ViT-L_16.npz
# (default: weights/). Runs are written to runs/ or to --runs_dir.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
dataset="${1:?usage: bash scripts/study.sh DATASET [FLAG]...}"
weights="${WEIGHTS:-weights}"
if [[ $root == *:* ]]; then
  echo "error: $root: a config's path must not contain ':'; move this checkout" >&2
  exit 1
fi

configs=()
for model in ViT-B_16 ViT-B_32 ViT-L_32 ViT-L_16; do
  configs+=("--config=$root/configs/original.py:$model,LN,$weights/$model.npz")
  for norm in LN BN GN Rescale; do
    configs+=("--config=$root/configs/original.py:$model,$norm")
  done
done

bash "$root/scripts/env.sh"
exec "$root/.venv/bin/python" -m rescalevit_jax.sweep "${configs[@]}" \
  --config.dataset="$dataset" "${@:2}"
