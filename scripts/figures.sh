#!/usr/bin/env bash
# Makes the figures of README.md and docs/ again. The screenshot of the report
# needs Chromium and trains eight small models first, about ten minutes on two
# CPU cores.
#
# Usage: bash scripts/figures.sh
# PYTHON: the interpreter; default: .venv/bin/python.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
images=docs/images
results=docs/results/norm_free

"$python" -m rescalevit_jax.analysis.plot_block --output=$images/block.svg
"$python" -m rescalevit_jax.report.plot_accuracies $results/accuracies_6000.csv \
  --label "LN=LayerNorm, RescaleViT's recipe" \
  --label "LN-rescalenet-unit-slow=LayerNorm, improved" \
  --label "Cal-rescalenet-unit-slow=no norm, improved" \
  --output=$images/accuracy.svg
"$python" -m rescalevit_jax.report.plot_accuracies --rates \
  $results/accuracies.csv --output=$results/accuracies.png

runs=runs/figures
"$python" -m rescalevit_jax.sweep --config=configs/quickstart.py \
  --runs_dir=$runs --grid model.norm=LN,BN,GN,Rescale --grid seed=0,1 \
  --config.total_steps=1000 --config.eval_every=100
"$python" -m rescalevit_jax.report $runs
"$(command -v chromium || command -v google-chrome)" --headless --no-sandbox \
  --hide-scrollbars --window-size=1100,900 \
  --screenshot=$images/report.png "file://$PWD/$runs/report.html"
