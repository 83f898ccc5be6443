#!/usr/bin/env bash
# Trains a small Vision Transformer with the norm Rescale on scikit-learn's
# handwritten digits: about a minute on four CPU cores, after an installation
# into .venv that happens once.
#
# Usage: bash scripts/quickstart.sh [FLAG]...
#
# The flags go to rescalevit_jax.main: --config.model.norm=LN, --workdir=DIR.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/env.sh"
cd "$root"
.venv/bin/python -m rescalevit_jax.main --config=configs/quickstart.py "$@"

cat << 'EOF'

Results lie in a folder of runs/ for each run, unless --workdir said otherwise:
result.json, metrics.jsonl, checkpoints and TensorBoard's files. Next:

  .venv/bin/python -m tensorboard.main --logdir=runs
      the curves, in a browser
  bash scripts/quickstart.sh --config.model.norm=LN
      the same with LayerNorm, to compare
  .venv/bin/python -m rescalevit_jax.main --config=configs/cifar_small.py
      CIFAR-10 with a small model
  .venv/bin/python -m rescalevit_jax.main --config=configs/vit_b16_rescale.py
      CIFAR-10 with ViT-B/16, for a GPU
EOF
