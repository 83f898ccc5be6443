"""Draw freshly initialized models side by side over depth."""

import collections
from collections.abc import Mapping, Sequence
import math

from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots

_BY_DEPTH = (
  diagnostics_plots.STREAM_CLS,
  diagnostics_plots.STREAM,
  diagnostics_plots.GRADIENT,
  diagnostics_plots.Quantity(
    "jacobian", "Jacobian, this block to the last", "|J|² / size", "log"
  ),
  diagnostics_plots.GRADIENT_QK,
  diagnostics_plots.ENTROPY,
  *diagnostics_plots.SATURATION,
)


def compare(
  models: Sequence[tuple[str, str, Mapping[str, float]]], clip: float
) -> figure_lib.Figure:
  """Draw measurements of models: of each block, and of the whole model.

  Args:
    models: label, norm and measurements of each model, the measurements as
      `probe.measure` returns them.
    clip: gradient norm at which gradients are clipped, drawn as a line; 0 for
      no clipping.
  """
  used: collections.Counter[str] = collections.Counter()
  styles = []
  for _, norm, _ in models:
    styles.append(plots.style(norm, used[norm]))
    used[norm] += 1
  every = [numbers for _, _, numbers in models]
  quantities = [
    quantity
    for quantity in _BY_DEPTH
    if any(f"block_00/{quantity.name}" in numbers for numbers in every)
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
      ax.plot(position, height, **{**style, "markersize": 7})
    ax.set_yscale("log")
    ax.set_xticks(
      positions,
      [plots.plain(label) for label, _, _ in models],
      rotation=45,
      ha="right",
    )
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
    ax.set_title(title, fontsize="small")
    ax.set_ylabel(unit, fontsize="small")
    diagnostics_plots.tidy(ax)
  figure.legend(
    *figure.axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=8,
    frameon=False,
    fontsize="small",
  )
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
  ax.set_title(quantity.title, fontsize="small")
  ax.set_xlabel("block", fontsize="small")
  ax.set_ylabel(quantity.unit, fontsize="small")
  deepest = max(blocks)
  words = {-1: "in"}  # Short, to leave a gap to the 0 beside it.
  if min(blocks) == deepest:  # Otherwise the heads are at different depths.
    words[deepest] = "head"
  numbers = range(0, deepest, math.ceil(deepest / 6))
  ticks = [*words, *numbers]
  ax.set_xticks(ticks, [words.get(tick, str(tick)) for tick in ticks])
  ax.set_xlim(-1.4, deepest + 0.4)
  diagnostics_plots.tidy(ax)
