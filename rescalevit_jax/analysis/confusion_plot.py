"""Picture of a confusion matrix."""

from collections.abc import Sequence
import csv
import pathlib

from jaxtyping import Int
from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax.analysis import plots
from rescalevit_jax.runs import folder

_MOST_WITH_NUMBERS = 20  # Classes.


def draw_run(where: pathlib.Path) -> None:
  """Draw confusion.png from the confusion.csv in a folder, if it has one."""
  path = where / folder.CONFUSION
  if path.exists():
    with open(path, encoding="utf-8", newline="") as f:
      _, *rows = csv.reader(f)
    names = [row[0] for row in rows]
    counts = np.array([row[1:] for row in rows], np.int64)
    plots.save(draw(counts, names), path.with_suffix(".png"))


def draw(
  counts: Int[np.ndarray, "C C"], class_names: Sequence[str]
) -> figure_lib.Figure:
  """Draw the fraction of each label (row) by predicted class (column)."""
  totals = np.maximum(counts.sum(1, keepdims=True), 1)
  percent = 100 * counts / totals
  classes = len(class_names)
  edge = min(4 + 0.4 * classes, 12)
  figure = figure_lib.Figure((edge + 1, edge), layout="constrained")
  axes = figure.add_subplot()
  image = axes.imshow(percent, cmap="viridis", vmin=0, vmax=100)
  figure.colorbar(image, label="% of the label's images", shrink=0.8)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("label")
  accuracy = 100 * np.trace(counts) / max(1, counts.sum())
  axes.set_title(f"accuracy {accuracy:.2f} %, {counts.sum():,} images")
  step = max(1, classes // 50)
  ticks = range(0, classes, step)
  names = [plots.plain(class_names[i]) for i in ticks]
  axes.set_xticks(ticks, names, rotation=90, fontsize=8)
  axes.set_yticks(ticks, names, fontsize=8)
  if classes <= _MOST_WITH_NUMBERS:
    for i, j in np.argwhere(counts):
      text = f"{percent[i, j]:.1f}"
      color = "black" if percent[i, j] > 60 else "white"
      axes.text(j, i, text, color=color, ha="center", va="center", fontsize=7)
  return figure
