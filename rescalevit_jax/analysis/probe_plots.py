"""A picture of fresh models side by side, by depth."""

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
  diagnostics_plots.GRADIENT_QK,
  diagnostics_plots.ENTROPY,
  *diagnostics_plots.SATURATION,
)


def compare(
  models: Sequence[tuple[str, str, Mapping[str, float]]], clip: float
) -> figure_lib.Figure:
  """Draws models side by side: by depth, and as a whole.

  Args:
    models: label, norm and numbers of each, the numbers by the names of
      `measurements.by_name` with `grad_norm` as a whole.
    clip: the largest norm of a gradient, drawn as a line; 0: none.
  """
  used, looks = {}, []
  for _, norm, _ in models:
    looks.append(plots.style(norm, used.get(norm, 0)))
    used[norm] = used.get(norm, 0) + 1
  every = [numbers for _, _, numbers in models]
  quantities = [
    quantity
    for quantity in _BY_DEPTH
    if any(f"block_00/{quantity.name}" in numbers for numbers in every)
  ]
  bars = [("grad_norm", "Gradient of all, before clipping", "norm")]
  if any("sharpness" in numbers for numbers in every):
    bars.append(("sharpness", "Sharpness", "|eigenvalue|"))
  figure, axes = diagnostics_plots.grid(len(quantities) + len(bars))
  figure.suptitle(
    "Freshly initialised, before the first step", fontsize="medium"
  )
  for quantity in quantities:
    _draw_depth(next(axes), quantity, models, looks)
  for name, title, unit in bars:
    ax = next(axes)
    heights = [abs(numbers.get(name, np.nan)) for numbers in every]
    places = np.arange(len(models))
    for place, height, look in zip(places, heights, looks, strict=True):
      ax.plot(place, height, **{**look, "markersize": 7})
    ax.set_yscale("log")
    ax.set_xticks(
      places,
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


def _draw_depth(ax, quantity, models, looks):
  blocks = []
  for (label, _, numbers), look in zip(models, looks, strict=True):
    parts = diagnostics_plots.parts(numbers)
    values = [numbers.get(f"{part}/{quantity.name}", np.nan) for part in parts]
    values = np.array(values)
    if quantity.scale == "log":
      values = np.where(values > 0, values, np.nan)
    blocks.append(len(parts) - 2)
    places = np.arange(len(parts)) - 1
    ax.plot(places, values, **look, label=plots.plain(label))
  if quantity.scale == "log":
    ax.set_yscale("log")
  if quantity.scale == "share":
    ax.set_ylim(-0.04, 1.04)
  ax.set_title(quantity.title, fontsize="small")
  ax.set_xlabel("block", fontsize="small")
  ax.set_ylabel(quantity.unit, fontsize="small")
  deepest = max(blocks)
  words = {-1: "in"}  # Short, or it would touch the 0 beside it.
  if min(blocks) == deepest:  # Or heads are at several places.
    words[deepest] = "head"
  numbers = range(0, deepest, math.ceil(deepest / 6))
  ticks = [*words, *numbers]
  ax.set_xticks(ticks, [words.get(tick, str(tick)) for tick in ticks])
  ax.set_xlim(-1.4, deepest + 0.4)
  diagnostics_plots.tidy(ax)
