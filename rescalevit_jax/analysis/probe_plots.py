"""Draw freshly initialized models side by side over depth."""

from collections.abc import Mapping, Sequence
import math

from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots

_BY_DEPTH = (
  "stream_rms_cls",
  "stream_rms_patches",
  "grad_norm",
  "jacobian",
  "grad_norm_qk",
  "attention_entropy",
  "saturation_attention",
  "saturation_mlp",
)


def compare(
  models: Sequence[tuple[str, str, Mapping[str, float]]], clip: float
) -> figure_lib.Figure:
  """Draw measurements of models: of each block, and of the whole model.

  Args:
    models: label, norm and result of `probe.measure` of each model.
    clip: norm at which gradients are clipped, drawn as a line; 0 for none.
  """
  styles = plots.styles(norm for _, norm, _ in models)
  every = [numbers for _, _, numbers in models]
  quantities = [
    diagnostics_plots.QUANTITIES[name]
    for name in _BY_DEPTH
    if any(f"block_00/{name}" in numbers for numbers in every)
  ]
  totals = [("grad_norm", "Whole gradient, before clipping", "norm")]
  if any("sharpness" in numbers for numbers in every):
    totals.append(("sharpness", "Sharpness", "|eigenvalue|"))
  figure, axes = diagnostics_plots.grid(len(quantities) + len(totals))
  figure.suptitle(
    "Freshly initialized, before the first step", fontsize="medium"
  )
  for quantity in quantities:
    _draw_depth(next(axes), quantity, models, styles)
  for name, title, unit in totals:
    ax = next(axes)
    heights = [abs(numbers.get(name, np.nan)) for numbers in every]
    positions = np.arange(len(models))
    for position, height, style in zip(positions, heights, styles, strict=True):
      ax.plot(position, height, **style | {"markersize": 7})
    ax.set_yscale("log")
    labels = [plots.plain(label) for label, _, _ in models]
    ax.set_xticks(positions, labels, rotation=45, ha="right")
    if name == "grad_norm" and clip:
      ax.axhline(clip, color="#555555", linestyle="--", linewidth=1)
      ax.annotate(
        "clip",
        (0, clip),
        (0, 2),
        textcoords="offset points",
        fontsize="x-small",
        color="#555555",
      )
    diagnostics_plots.label(ax, title, "", unit)
    diagnostics_plots.tidy(ax)
  plots.legend_below(figure.axes[0], 8, fontsize="small")
  return figure


def _draw_depth(ax, quantity, models, styles):
  blocks = []
  for (label, _, numbers), style in zip(models, styles, strict=True):
    parts = diagnostics_plots.parts(numbers)
    values = [numbers.get(f"{part}/{quantity.name}", np.nan) for part in parts]
    values = np.array(values)
    if quantity.scale == "log":
      values = np.where(values > 0, values, np.nan)
    blocks.append(len(parts) - 2)
    depths = np.arange(len(parts)) - 1
    ax.plot(depths, values, **style, label=plots.plain(label))
  if quantity.scale == "log":
    ax.set_yscale("log")
  if quantity.scale == "share":
    ax.set_ylim(-0.04, 1.04)
  diagnostics_plots.label(ax, quantity.title, "block", quantity.unit)
  deepest = max(blocks)
  words = {-1: "in"}  # Short, to leave a gap to the 0 beside it.
  if min(blocks) == deepest:  # Otherwise the heads are at different depths.
    words[deepest] = "head"
  numbers = range(0, deepest, math.ceil(deepest / 6))
  ticks = [*words, *numbers]
  ax.set_xticks(ticks, [words.get(tick, str(tick)) for tick in ticks])
  ax.set_xlim(-1.4, deepest + 0.4)
  diagnostics_plots.tidy(ax)
