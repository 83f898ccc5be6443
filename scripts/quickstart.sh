#!/usr/bin/env bash
# Trains a small Vision Transformer with the norm Rescale on scikit-learn's
# handwritten digits. Takes about a minute on four CPU cores, plus a first
# installation into .venv.
#
# Usage: bash scripts/quickstart.sh [FLAG]...
#
# Flags are passed to rescalevit_jax.main: --config.model.norm=LN,
# --workdir=DIR.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/env.sh"
cd "$root"
.venv/bin/python -m rescalevit_jax.main --config=configs/quickstart.py "$@"

cat << 'EOF'

The results are in a folder in runs/, or in --workdir: result.json,
metrics.jsonl, checkpoints and TensorBoard files. Next steps:

  .venv/bin/python -m tensorboard.main --logdir=runs
      show the curves in a browser
  bash scripts/quickstart.sh --config.model.norm=LN
      train with LayerNorm, to compare
  .venv/bin/python -m rescalevit_jax.main --config=configs/cifar_small.py
      train a small model on CIFAR-10
  .venv/bin/python -m rescalevit_jax.main --config=configs/vit_b16_rescale.py
      train ViT-B/16 on CIFAR-10, on a GPU
EOF
