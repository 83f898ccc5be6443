"""Draw an encoder block with its norm and residual slots.

python -m rescalevit_jax.analysis.plot_block --output=docs/images/block.svg
"""

from collections.abc import Sequence
import pathlib
import sys
import textwrap
from typing import Any

from matplotlib import figure as figure_lib
from matplotlib import patches

from rescalevit_jax.analysis import plots
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.runtime import cli

_LAYER, _NORM, _RESIDUAL = "#E8E8E8", "#9CCBEB", "#F7CE85"
_STREAM, _BRANCH = 0.0, 1.5  # Heights of the two rows of boxes.


def main(argv: Sequence[str] | None = None) -> int:
  """Draw the block; return the exit code."""
  parser = cli.parser(__doc__)
  parser.add_argument(
    "--output",
    action="append",
    type=pathlib.Path,
    required=True,
    help="picture, .png or .svg; repeatable",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: _save(args.output))


def _save(paths):
  for path in paths:
    plots.check_suffix(path)
  for path in paths:
    plots.save(draw(), path)


def draw() -> figure_lib.Figure:
  """Return the figure; the names come from the tables of the models."""
  figure = figure_lib.Figure((10, 3.3), layout="constrained")
  axes = figure.subplots()
  axes.set(xlim=(-1.1, 13.9), ylim=(-2.1, 2.35), aspect="equal")
  axes.set_axis_off()
  frame: dict[str, Any] = {"fill": False, "edgecolor": "0.6", "linestyle": "--"}
  axes.add_patch(
    patches.FancyBboxPatch((1.15, -0.65), 9.3, 2.75, "round,pad=0.1", **frame)
  )
  axes.text(10.4, 1.95, "L blocks", ha="right", va="top", color="0.4")

  def box(x, y, text, color, width=1.5):
    corner = (x - width / 2, y - 0.35)
    look: dict[str, Any] = {"facecolor": color, "edgecolor": "0.3"}
    axes.add_patch(
      patches.FancyBboxPatch(corner, width, 0.7, "round,pad=0.05", **look)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9)

  def arrow(start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.2})

  def line(*points):
    axes.plot(*zip(*points, strict=True), color="black", lw=1.2, zorder=0)

  line((-0.2, _STREAM), (12.7, _STREAM))
  for start, layer in ((1.45, "attention"), (6.0, "MLP")):
    line((start, _STREAM), (start, _BRANCH), (start + 3.6, _BRANCH))
    arrow((start + 3.6, _BRANCH), (start + 3.6, _STREAM + 0.4))
    arrow((start + 2.3, _STREAM), (start + 2.85, _STREAM))
    box(start + 0.95, _BRANCH, "norm", _NORM, 1.1)
    box(start + 2.55, _BRANCH, layer, _LAYER, 1.3)
    box(start + 3.6, _STREAM, "residual", _RESIDUAL, 1.4)
  box(-0.1, _STREAM, "patch\nembedding", _LAYER)
  box(11.6, _STREAM, "norm", _NORM, 1.1)
  box(13.1, _STREAM, "head", _LAYER, 1.1)
  for y, key, color, names in (
    (-1.2, "model.norm", _NORM, norms.NORMS),
    (-1.85, "model.residual", _RESIDUAL, vit_config.RESIDUALS),
  ):
    axes.add_patch(
      patches.Rectangle((-0.8, y - 0.13), 0.3, 0.3, fc=color, ec="0.3")
    )
    text = textwrap.fill(f"{key}: {', '.join(names)}", 110)
    axes.text(-0.3, y, text, va="center", fontsize=9)
  return figure


if __name__ == "__main__":
  sys.exit(main())
