"""Draw a run's diagnostics over depth and time."""

from collections.abc import Iterable, Iterator
import dataclasses
import math
import re

import matplotlib
from matplotlib import axes as axes_lib
from matplotlib import colors
from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np

from rescalevit_jax.analysis import plots
from rescalevit_jax.runs import run_reader
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import measurements

_COLUMNS = (4, 5)
_COLORMAP, _DIVERGING = "viridis", "PuOr"
_MISSING = "#d9d9d9"
_ORDERS = 5  # Maximum orders of magnitude of a logarithmic color scale.


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A quantity with a value for each part of the model."""

  name: str  # In metrics.jsonl, after the name of the part.
  title: str
  unit: str
  scale: str  # 'log', 'linear', 'signed' (about 0) or 'share' (0 to 1).


QUANTITIES = {
  quantity.name: quantity
  for quantity in (
    Quantity("stream_rms_cls", "Residual stream, class token", "RMS", "log"),
    Quantity("stream_rms_patches", "Residual stream, patches", "RMS", "log"),
    Quantity(
      "stream_mean_cls", "Residual stream, class token", "mean", "signed"
    ),
    Quantity(
      "stream_mean_patches", "Residual stream, patches", "mean", "signed"
    ),
    Quantity("grad_norm", "Gradient, before clipping", "norm", "log"),
    Quantity(
      "jacobian", "Jacobian, this block to the last", "|J|² / size", "log"
    ),
    Quantity("grad_norm_qk", "Gradient of queries and keys", "norm", "log"),
    Quantity(
      "update_ratio", "Relative update per step", "|update| / |weights|", "log"
    ),
    Quantity("attention_entropy", "Attention entropy", "nats", "linear"),
    Quantity(
      "saturation_attention",
      "Saturated outputs, attention's norm",
      "share",
      "share",
    ),
    Quantity(
      "saturation_mlp", "Saturated outputs, the MLP's norm", "share", "share"
    ),
  )
}
# Kinds and sites of learned scalars; see `measurements.scalars`.
_SCALARS = {
  "alpha": "Alpha",
  "beta": "Beta",
  "shift": "Shift",
  "branch": "Multiplier of the branch",
  "scale": "Scale of the norm",
  "bn_scale": "Scale of its BatchNorm",
  "change": "Change of the scale",
  "eta": "Eta",
  "lam": "Lambda",
  "gamma": "Gamma",
}
# Names of a block's quantities, in metrics and in measurements of fresh models.
_BLOCK = re.compile(rf"(?:{diagnostics.PREFIX})?(block_\d+)/")
_RMS = {"scale", "bn_scale", "change"}
_LAYERS = {"mlp": "MLP", "Dense_0": "MLP's first", "Dense_1": "MLP's second"}


def is_diagnosed(run: run_reader.Run) -> bool:
  """Return True if a run has diagnostics."""
  return any(_lines(run))


def _lines(run):
  """Return the lines of metrics with diagnostics."""
  prefix = diagnostics.PREFIX
  return [x for x in run.metrics if any(name.startswith(prefix) for name in x)]


def draw(run: run_reader.Run, name: str) -> figure_lib.Figure:
  """Draw a run: quantities of parts over depth and time, others over time.

  Values that are not finite, or 0 on a logarithmic scale, are gray.
  """
  lines = _lines(run)
  steps = np.array([line["step"] for line in lines])
  names = parts(set().union(*lines))
  rows = {}
  for quantity in QUANTITIES.values():
    found = np.array(
      [[_of_part(line, part, quantity) for line in lines] for part in names]
    )
    there = ~np.isnan(found).all(axis=1)
    if there.any():
      labels = [_number(names[i]) for i in np.flatnonzero(there)]
      rows[quantity] = labels, found[there]
  scalars = _scalars(lines)
  figure, axes = grid(len(rows) + len(scalars) + 3)
  for quantity, (labels, values) in rows.items():
    _draw_map(figure, next(axes), quantity, steps, labels, values)
  for quantity in scalars:
    values = [
      [_of_part(line, part, quantity) for part in names[1:-1]] for line in lines
    ]
    _draw_scalar(figure, next(axes), quantity, steps, np.array(values))
  _draw_over_time(axes, run)
  config = run.config
  title = (
    f"{name}: {config.model.norm}, {config.model_name} on {config.dataset},"
    f" seed {config.seed}"
  )
  figure.suptitle(plots.plain(title), fontsize="medium")
  return figure


def _scalars(lines):
  """Return the learned scalars of the blocks, attention's first."""
  names = {
    x.rpartition("/")[2] for line in lines for x in line if _BLOCK.match(x)
  }
  matches = [
    re.fullmatch("(bn_scale|[^_]+)_(.*)", name)
    for name in sorted(names - QUANTITIES.keys())
  ]
  split = [match.groups() for match in matches if match]
  return [
    Quantity(
      f"{kind}_{site}",
      f"{_SCALARS.get(kind, kind)}, {_LAYERS.get(site, site)}",
      "RMS over channels" if kind in _RMS else "value",
      "linear",
    )
    for kind, site in sorted(split, key=lambda x: [*_SCALARS, x[0]].index(x[0]))
  ]


def parts(names: Iterable[str]) -> list[str]:
  """Return the parts of a model from the names of its quantities."""
  blocks = {match[1] for match in map(_BLOCK.match, names) if match}
  return measurements.parts(len(blocks))


def _of_part(line, part, quantity):
  value = line.get(f"{diagnostics.PREFIX}{part}/{quantity.name}")
  return value if isinstance(value, int | float) else np.nan


def _number(part):
  return part.removeprefix("block_").lstrip("0") or "0" if "_" in part else part


def grid(count: int) -> tuple[figure_lib.Figure, Iterator[axes_lib.Axes]]:
  """Return a figure with `count` panels, and an iterator over their axes."""
  columns = min(_COLUMNS, key=lambda columns: -count % columns)
  rows = math.ceil(count / columns)
  figure = figure_lib.Figure(
    figsize=(3.3 * columns, 2.6 * rows + 0.4), layout="constrained"
  )
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for ax in axes[count:]:
    ax.set_visible(False)
  return figure, iter(axes)


def _draw_map(figure, ax, quantity, steps, labels, values):
  middles = (steps[1:] + steps[:-1]) / 2
  last = steps[-1] + (steps[-1] - middles[-1] if len(middles) else 1)
  edges = np.concatenate([[0], middles, [last]])
  if quantity.scale == "log":
    values = np.where(values > 0, values, np.nan)
  norm, extend = _norm(quantity.scale, values)
  colormap = _DIVERGING if quantity.scale == "signed" else _COLORMAP
  ax.set_facecolor(_MISSING)
  mesh = ax.pcolormesh(
    edges,
    np.arange(len(labels) + 1) - 0.5,
    np.ma.masked_invalid(values),
    cmap=matplotlib.colormaps[colormap],
    norm=norm,
    rasterized=True,
  )
  label(ax, quantity.title, "step", "block")
  every = math.ceil(len(labels) / 8)
  words = {i for i, label in enumerate(labels) if not label.isdecimal()}
  numbers = [i for i, label in enumerate(labels) if label.isdecimal()]
  ticks = sorted({*words, *numbers[::every]})
  ax.set_yticks(ticks, [labels[i] for i in ticks])
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
  ax.tick_params(labelsize="x-small")
  bar = figure.colorbar(mesh, ax=ax, extend=extend)
  bar.set_label(quantity.unit, fontsize="small")
  bar.ax.tick_params(labelsize="x-small", which="both")


def _draw_scalar(figure, ax, quantity, steps, values):
  """Draw a line for each block, to show which scalars become 0."""
  colormap = matplotlib.colormaps[_COLORMAP]
  depth = colors.Normalize(0, max(1, values.shape[1] - 1))
  for block, column in enumerate(values.T):
    ax.plot(steps, column, color=colormap(depth(block)), lw=1.2)
  ax.axhline(0, color="#555555", lw=0.8)
  _label_axes(ax, quantity.title, quantity.unit)
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
  bar = figure.colorbar(matplotlib.cm.ScalarMappable(depth, colormap), ax=ax)
  bar.set_label("block", fontsize="small")
  bar.locator = ticker.MaxNLocator(4, integer=True)
  bar.ax.tick_params(labelsize="x-small")


def _norm(scale, values):
  """Return the color normalization, and the clipped end of the scale."""
  if scale == "share":
    return colors.Normalize(0, 1), "neither"
  known = values[np.isfinite(values)]
  if not known.size:
    return colors.Normalize(0, 1), "neither"
  low, high = known.min(), known.max()
  if scale == "signed":
    bound = max(abs(low), abs(high)) or 1.0
    return colors.Normalize(-bound, bound), "neither"
  if scale == "linear":
    margin = 1e-3 * abs(high) * (high - low < 1e-3 * abs(high))
    return colors.Normalize(low - margin, high + margin), "neither"
  bottom = max(low, high * 10**-_ORDERS)
  if high < 1.1 * bottom:
    bottom, high = bottom / 1.1, high * 1.1
  return colors.LogNorm(bottom, high), "min" if bottom > low else "neither"


def _draw_over_time(axes, run):
  """Draw the quantities of the whole model, in three panels."""
  style = {"color": "#0072B2", "marker": "o", "markersize": 3}
  other = {"color": "#D55E00", "marker": "s", "markersize": 3, "ls": "none"}

  def curve(name):
    return map(np.array, run.curve(diagnostics.PREFIX + name))

  ax = next(axes)
  steps, shares = curve("clipped_share")
  ax.plot(steps, 100 * shares, **style)
  ax.set(ylim=(-4, 104))
  _label_axes(ax, "Clipped steps since the last point", "%")
  ax = next(axes)
  ax.plot(*run.curve("train/lr"), "--", color="#555555", label="schedule")
  ax.plot(*curve("effective_lr"), **style, label="after clipping")
  ax.legend(frameon=False, fontsize="x-small")
  _label_axes(ax, "Learning rate", "learning rate")
  ax = next(axes)
  steps, values = curve("sharpness")
  for chosen, line, text in (
    (values > 0, style, "> 0"),
    (values < 0, other, "< 0"),
  ):
    if chosen.any():
      ax.plot(steps[chosen], np.abs(values[chosen]), **line, label=text)
  if (values < 0).any():
    ax.legend(frameon=False, fontsize="x-small")
  if values.any() and np.abs(values).max() > 10 * np.abs(values).min():
    ax.set_yscale("log")
  _label_axes(ax, "Sharpness", "|eigenvalue|")


def _label_axes(ax, title, unit):
  label(ax, title, "step", unit)
  ax.set_xlim(left=0)
  tidy(ax)


def label(ax: axes_lib.Axes, title: str, xlabel: str, ylabel: str) -> None:
  """Set the texts of a panel."""
  ax.set_title(title, fontsize="small")
  ax.set_xlabel(xlabel, fontsize="small")
  ax.set_ylabel(ylabel, fontsize="small")


def tidy(ax: axes_lib.Axes) -> None:
  """Style the axes of a line plot: faint grid, no upper or right spine."""
  ax.tick_params(labelsize="x-small", which="both")
  ax.grid(alpha=0.25)
  ax.spines[["top", "right"]].set_visible(False)
