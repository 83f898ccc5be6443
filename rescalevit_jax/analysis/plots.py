"""Draw the curves of runs; style and save figures.

Figures are created without pyplot, which needs global state and perhaps a
window.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import pathlib
from typing import Any

from jaxtyping import UInt8
import matplotlib
from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib
from matplotlib.backends import backend_agg
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.models import norms
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import csv_text

# Markers distinguish the norms in grayscale.
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
  """Return a norm's color, the same in every picture, as '#rrggbb'."""
  return norms.NORMS[norm].COLOR


def styles(names: Iterable[str]) -> list[dict[str, Any]]:
  """Return a distinct line style for each norm: color, marker, line."""
  used: collections.Counter[str] = collections.Counter()
  found = []
  for norm in names:
    found.append(
      {
        "color": norm_color(norm),
        "marker": _MARKERS[list(norms.NORMS).index(norm) % len(_MARKERS)],
        "markersize": 4,
        "linestyle": _LINES[used[norm] % len(_LINES)],
        "linewidth": 1.5,
      }
    )
    used[norm] += 1
  return found


def plain(text: str) -> str:
  """Escape formulas, and undecodable bytes of file names, for matplotlib."""
  text = text.encode("utf-8", "backslashreplace").decode("utf-8")
  return text.replace("$", r"\$")


def add_flags(
  parser: argparse.ArgumentParser, default: str, scope: str = ""
) -> None:
  """Add --workdir and --output, both repeatable."""
  parser.add_argument(
    "--workdir",
    action="append",
    required=True,
    help="folder of a run, or of several runs; repeatable",
  )
  parser.add_argument(
    "--output",
    action="append",
    default=[],
    type=pathlib.Path,
    help=f"the picture{scope}, .png or .svg; repeatable (default: {default})",
  )


def check_suffix(path: pathlib.Path) -> None:
  """Raise UserError unless the suffix is a supported picture format."""
  if path.suffix.lower() not in _FORMATS:
    raise errors.UserError(
      f"{path}: is no supported picture format; use {' or '.join(_FORMATS)}"
    )


def render(figure: figure_lib.Figure, kind: str, dpi: int = 150) -> bytes:
  """Return a figure as 'png' or 'svg'. Equal figures yield equal bytes."""
  _fix_layout(figure)
  metadata = {"Date": None} if kind == "svg" else {}
  picture = io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "rescalevit"}):
    figure.savefig(picture, format=kind, dpi=dpi, metadata=metadata)
  return picture.getvalue()


def _fix_layout(figure):
  """Compute the layout once and round it.

  The solver's rounding errors differ between processes.
  """
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  parts = [figure]
  for part in parts:
    for ax in part.axes:
      ax.set_position(np.round(ax.get_position(original=True).bounds, 6))
    for child in part.subfigs:
      points = np.round(child.bbox_relative.get_points(), 6)
      child.bbox_relative.set_points(points)
      parts.append(child)


def save(figure: figure_lib.Figure, path: pathlib.Path) -> None:
  """Write a figure as PNG or SVG, depending on the path's suffix."""
  check_suffix(path)
  write(path, render(figure, path.suffix.lower().removeprefix(".")))


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Write an output file, in a new folder if necessary."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.write(path, content)
  except OSError as e:
    raise errors.UserError(
      f"{path}: cannot be written ({e.strerror}); choose another path"
    ) from e


def save_with_table(
  draw: Callable[[], figure_lib.Figure],
  rows: Iterable[Iterable[Any]],
  stem: pathlib.Path,
) -> None:
  """Write STEM.csv, then draw STEM.png and STEM.svg; print their paths."""
  write(stem.with_suffix(".csv"), csv_text.table(rows))
  figure = draw()
  for suffix in _FORMATS:
    save(figure, stem.with_suffix(suffix))
  for suffix in (".csv", *_FORMATS):
    print(stem.with_suffix(suffix))


def svg(figure: figure_lib.Figure) -> str:
  """Return a figure as an <svg> element, for embedding in HTML."""
  text = render(figure, "svg").decode("utf-8")
  return text[text.index("<svg") :]


def legend_below(axes: axes_lib.Axes, columns: int, **options: Any) -> None:
  """Put the legend of axes below their figure."""
  axes.figure.legend(
    *axes.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    **options,
  )


def pixels(figure: figure_lib.Figure) -> UInt8[np.ndarray, "H W 3"]:
  """Return a figure as an image."""
  _fix_layout(figure)
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


def curves(runs: Sequence[run_reader.Run]) -> figure_lib.Figure:
  """Draw accuracy and loss of all runs over steps.

  Runs that differ only in the seed share color, line and legend entry. The
  training loss is faint; the published curve of the same recipe is dotted.
  """
  figure = figure_lib.Figure(figsize=(11, 4.2), layout="constrained")
  accuracy, loss = figure.subplots(1, 2)
  groups = _labeled(run_reader.group(runs))
  line_styles = styles(_norm(group[0]) for _, group in groups)
  for (label, members), style in zip(groups, line_styles, strict=True):
    faint = {**style, "marker": "", "linewidth": 0.8, "alpha": 0.35}
    dotted = {"color": style["color"], "linestyle": ":", "alpha": 0.5}
    count = f", {len(members)} runs" if len(members) > 1 else ""
    for i, run in enumerate(members):
      steps, values = run.curve("test/accuracy")
      style["markevery"] = max(1, len(steps) // 10)
      style["label"] = None if i else label + count
      accuracy.plot(steps, [100 * x for x in values], **style)
      loss.plot(*run.curve("test/loss"), **style)
      loss.plot(*run.curve("train/loss"), **faint)
    if published := reference_results.curve(members[0].config):
      values = [100 * x for x in published.accuracy]
      dotted_label = f"{label}, published"
      accuracy.plot(published.steps, values, **dotted, label=dotted_label)
      loss.plot(published.steps, published.loss, **dotted)
  accuracy.set(xlabel="step", ylabel="test accuracy, %")
  loss.set(xlabel="step", ylabel="test loss, training loss (faint)")
  for axes in (accuracy, loss):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(plain(_title(runs)), fontsize="medium")
  legend_below(accuracy, 4)
  return figure


def loss_and_accuracy(
  panels: Mapping[str, Sequence[run_reader.Run]],
) -> figure_lib.Figure:
  """Draw test loss and accuracy over steps, a panel for each title.

  All panels have the same axes. Published curves are dotted.
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
    published = reference_results.curve(config)
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


def _labeled(groups) -> list[tuple[str, tuple[run_reader.Run, ...]]]:
  """Return each group with a label of its distinctive keys, in norm order."""
  varied = run_reader.varied_keys([group[0].config for group in groups])
  varied = [key for key in varied if key != "model.norm"]
  paths = {group[0].config.pretrained_path for group in groups} - {None}
  short = len({pathlib.Path(path).name for path in paths}) == len(paths)
  order = list(norms.NORMS)
  labeled = []
  for group in sorted(groups, key=lambda x: order.index(_norm(x[0]))):
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
    labeled.append((plain(", ".join(parts)), group))
  return labeled


def _norm(run):
  return run.config.model.norm


def _title(runs):
  """Return the model and the dataset, if all runs share them."""
  parts = []
  for key in ("model_name", "dataset"):
    values = {run.config[key] for run in runs}
    if len(values) == 1:
      parts += values
  return " on ".join(parts)
