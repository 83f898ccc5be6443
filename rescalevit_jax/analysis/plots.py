"""Draw the curves of runs; style and save figures.

Figures are created without pyplot, which needs global state and perhaps a
window.
"""

import collections
from collections.abc import Mapping, Sequence
import io
import os
import pathlib
from typing import Any

from jaxtyping import UInt8
import matplotlib
from matplotlib import figure as figure_lib
from matplotlib.backends import backend_agg
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.models import norms
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file

# Markers distinguish the norms in greyscale.
_MARKERS = "osD^vP*X<>h"
# Dotted lines are reserved for published curves.
_LINES = (
  "-",
  "--",
  "-.",
  (0, (8, 2)),
  (0, (3, 1, 1, 1, 1, 1)),
  (0, (2, 1)),
  (0, (8, 2, 2, 2, 2, 2)),
  (0, (5, 4)),
)
_FORMATS = (".png", ".svg")


def norm_color(norm: str) -> str:
  """Return a norm's colour, the same in every picture, as '#rrggbb'."""
  return norms.NORMS[norm].COLOR


def style(norm: str, used: int) -> dict[str, Any]:
  """Return the style of a norm's line: colour, marker, line.

  Args:
    norm: name of the norm.
    used: number of lines of the norm already in the picture.
  """
  return {
    "color": norm_color(norm),
    "marker": _MARKERS[list(norms.NORMS).index(norm) % len(_MARKERS)],
    "markersize": 4,
    "linestyle": _LINES[used % len(_LINES)],
    "linewidth": 1.5,
  }


def plain(text: str) -> str:
  """Return a text that matplotlib displays literally.

  Escapes formulas, and undecodable bytes of file names.
  """
  text = text.encode("utf-8", "backslashreplace").decode("utf-8")
  return text.replace("$", r"\$")


def check_suffix(path: str | os.PathLike[str]) -> None:
  """Raise UserError unless the suffix is a supported picture format."""
  if pathlib.Path(path).suffix.lower() not in _FORMATS:
    raise errors.UserError(
      f"{path}: is no supported picture format; use {' or '.join(_FORMATS)}"
    )


def save(figure: figure_lib.Figure, path: pathlib.Path) -> None:
  """Write a figure as PNG or SVG, depending on the path's suffix.

  Equal figures yield equal bytes.

  Raises:
    UserError: the suffix is unknown, or the file cannot be written.
  """
  path = pathlib.Path(path)
  check_suffix(path)
  kind = path.suffix.lower().removeprefix(".")
  metadata = {"Date": None} if kind == "svg" else {}
  picture = io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "rescalevit"}):
    figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.write(path, picture.getvalue())
  except OSError as e:
    raise errors.UserError(f"{path}: cannot be written ({e.strerror})") from e


def svg(figure: figure_lib.Figure) -> str:
  """Return a figure as an <svg> element, for embedding in HTML."""
  text = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "rescalevit"}):
    figure.savefig(text, format="svg", metadata={"Date": None})
  return text.getvalue()[text.getvalue().index("<svg") :]


def pixels(figure: figure_lib.Figure) -> UInt8[np.ndarray, "H W 3"]:
  """Return a figure as an image."""
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


def curves(runs: Sequence[run_reader.Run]) -> figure_lib.Figure:
  """Draw accuracy and loss of all runs over steps.

  Runs that differ only in the seed share colour, line and legend entry. The
  training loss is faint; the published curve of the same recipe is dotted.

  Args:
    runs: at least one run.
  """
  figure = figure_lib.Figure(figsize=(11, 4.2), layout="constrained")
  accuracy, loss = figure.subplots(1, 2)
  used: collections.Counter[str] = collections.Counter()
  for label, members in _labelled(run_reader.group(runs)):
    norm = members[0].config.model.norm
    line_style = style(norm, used[norm])
    used[norm] += 1
    count = f", {len(members)} runs" if len(members) > 1 else ""
    for i, run in enumerate(members):
      _draw_run(accuracy, loss, run, line_style, None if i else label + count)
    key = reference_results.match(members[0].config)
    if key and (published := reference_results.curves().get(key)):
      _draw_published(accuracy, loss, published, line_style, label)
  accuracy.set(xlabel="step", ylabel="test accuracy, %")
  loss.set(xlabel="step", ylabel="test loss, training loss (faint)")
  for axes in (accuracy, loss):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(plain(_title(runs)), fontsize="medium")
  figure.legend(
    *accuracy.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    frameon=False,
  )
  return figure


def loss_and_accuracy(
  panels: Mapping[str, Sequence[run_reader.Run]],
) -> figure_lib.Figure:
  """Draw test loss and accuracy over steps, a panel for each recipe.

  All panels have the same axes. Published curves are dotted.

  Args:
    panels: runs of a recipe, by title.
  """
  columns, count = min(3, len(panels)), len(panels)
  rows = -(-count // columns)
  figure = figure_lib.Figure(
    figsize=(1.2 + 3.4 * columns, 0.9 + 2.6 * rows), layout="constrained"
  )
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  axes, spare = list(grid.flat[:count]), grid.flat[count:]
  for ax in spare:
    ax.remove()
  twins = [ax.twinx() for ax in axes]
  dotted = ""
  for i, (title, runs) in enumerate(panels.items()):
    config = runs[0].config
    axes[i].set_title(plain(title), color=norm_color(config.model.norm))
    at_right = i == count - 1 or i % columns == columns - 1
    twins[i].sharey(twins[0])
    twins[i].tick_params(labelright=at_right)
    if i + columns >= count:
      axes[i].set_xlabel("step")
      axes[i].tick_params(labelbottom=True)
    key = reference_results.match(config)
    published = reference_results.curves().get(key) if key else None
    for ax, name, color, unit, at_edge in (
      (axes[i], "loss", "tab:green", 1, i % columns == 0),
      (twins[i], "accuracy", "tab:blue", 100, at_right),
    ):
      for run in runs:
        steps, values = run.curve(f"test/{name}")
        ax.plot(steps, [unit * x for x in values], color=color)
      if published:
        values = [unit * x for x in getattr(published, name)]
        ax.plot(published.steps, values, color=color, linestyle=":", alpha=0.6)
      if at_edge:
        text = f"test {name}" + ", %" * (unit == 100)
        ax.set_ylabel(text, color=color)
      ax.spines["top"].set_visible(False)
    if published:
      dotted = "; dotted: published"
  runs = [run for runs in panels.values() for run in runs]
  figure.suptitle(plain(_title(runs) + dotted), fontsize="medium")
  return figure


def _draw_run(accuracy, loss, run, line_style, label):
  steps, values = run.curve("test/accuracy")
  every = max(1, len(steps) // 10)
  accuracy.plot(
    steps, [100 * v for v in values], **line_style, markevery=every, label=label
  )
  loss.plot(*run.curve("test/loss"), **line_style, markevery=every)
  line_style = {**line_style, "marker": "", "linewidth": 0.8}
  loss.plot(*run.curve("train/loss"), **line_style, alpha=0.35)


def _draw_published(accuracy, loss, curve, line_style, label):
  line_style = {"color": line_style["color"], "linestyle": ":", "alpha": 0.5}
  accuracy.plot(
    curve.steps,
    [100 * a for a in curve.accuracy],
    **line_style,
    label=f"{label}, published",
  )
  loss.plot(curve.steps, curve.loss, **line_style)


def _labelled(groups) -> list[tuple[str, tuple[run_reader.Run, ...]]]:
  """Return each group with a label of its distinctive keys, in norm order."""
  varied = run_reader.varied_keys([group[0].config for group in groups])
  varied = [key for key in varied if key != "model.norm"]
  paths = {group[0].config.pretrained_path for group in groups} - {None}
  short = len({pathlib.Path(path).name for path in paths}) == len(paths)
  labelled = []
  for group in groups:
    values = config_lib.flatten(group[0].config)
    parts = [values["model.norm"]]
    for key in varied:
      value = values[key]
      if key == "pretrained_path":
        name = pathlib.Path(value).name if value and short else value
        parts.append(f"from {name}" if value else "from scratch")
      elif key in ("dataset", "model_name"):
        parts.append(value)
      else:
        parts.append(f"{key.rpartition('.')[2]}={value}")
    labelled.append((plain(", ".join(parts)), group))
  order = list(norms.NORMS)
  return sorted(
    labelled, key=lambda item: order.index(item[1][0].config.model.norm)
  )


def _title(runs):
  """Return the model and the dataset, if all runs share them."""
  parts = []
  for key in ("model_name", "dataset"):
    values = {config_lib.flatten(run.config)[key] for run in runs}
    if len(values) == 1:
      parts += values
  return " on ".join(parts)
