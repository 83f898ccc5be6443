"""Curves of runs, and what all pictures share: colours, saving.

Figures are made without pyplot, so that no window and no global state is
needed.
"""

from collections.abc import Mapping, Sequence
import io
import os
import pathlib
from typing import Any

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

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind
# readers can tell apart, and three of Paul Tol's; markers tell the norms apart
# in grey.
_COLORS = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#D55E00",
  "#CC79A7",
  "#56B4E9",
  "#000000",
  "#882255",
  "#999933",
  "#777777",
  "#332288",
)
_MARKERS = "osD^vP*X<>h"
# Dotted are the published ones.
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
  """Returns a norm's colour, the same in every picture, as '#rrggbb'."""
  return _COLORS[list(norms.NORMS).index(norm) % len(_COLORS)]


def style(norm: str, used: int) -> dict[str, Any]:
  """Returns how a norm's line looks: colour, marker, line.

  Args:
    norm: its name.
    used: how many lines of the norm the picture has already.
  """
  return {
    "color": norm_color(norm),
    "marker": _MARKERS[list(norms.NORMS).index(norm) % len(_MARKERS)],
    "markersize": 4,
    "linestyle": _LINES[used % len(_LINES)],
    "linewidth": 1.5,
  }


def plain(text: str) -> str:
  """Returns a text that matplotlib shows as it is.

  Without formulas; bytes of a file's name that are no characters are escaped.
  """
  text = text.encode("utf-8", "backslashreplace").decode("utf-8")
  return text.replace("$", r"\$")


def check_suffix(path: str | os.PathLike[str]) -> None:
  """Raises UserError unless a picture can be written under this name."""
  if pathlib.Path(path).suffix.lower() not in _FORMATS:
    raise errors.UserError(
      f"{path}: must end in {' or '.join(_FORMATS)} to be written as a picture"
    )


def save(figure: figure_lib.Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG or SVG, as the path's suffix says.

  The same figure gives the same bytes.

  Raises:
    UserError: another suffix, or the file cannot be written.
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
  """Returns a figure as an <svg> element, to be put into a page."""
  text = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "rescalevit"}):
    figure.savefig(text, format="svg", metadata={"Date": None})
  return text.getvalue()[text.getvalue().index("<svg") :]


def pixels(figure: figure_lib.Figure) -> np.ndarray:
  """Returns a figure as an image, uint8 [H, W, 3]."""
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


def curves(
  runs: Sequence[run_reader.Run],
  published: Mapping[reference_results.Key, reference_results.Curve]
  | None = None,
) -> figure_lib.Figure:
  """Draws accuracy and loss over steps, all runs laid over each other.

  Runs that differ only in the seed share colour, line and legend entry. Faint:
  the training loss, and, dotted, the published curve of the same recipe.

  Args:
    runs: at least one.
    published: curves of RescaleViT, from `published.read_curves`.
  """
  figure = figure_lib.Figure(figsize=(11, 4.2), layout="constrained")
  accuracy, loss = figure.subplots(1, 2)
  used = {}
  for label, members in _labelled(run_reader.group(runs)):
    norm = members[0].config.model.norm
    look = style(norm, used.get(norm, 0))
    used[norm] = used.get(norm, 0) + 1
    count = f", {len(members)} runs" if len(members) > 1 else ""
    for i, run in enumerate(members):
      _draw_run(accuracy, loss, run, look, None if i else label + count)
    key = reference_results.match(members[0].config)
    if key in (published or {}):
      _draw_published(accuracy, loss, published[key], look, label)
  accuracy.set(xlabel="step", ylabel="test accuracy, %")
  loss.set(xlabel="step", ylabel="loss: test, and training (faint)")
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


def _draw_run(accuracy, loss, run, look, label):
  steps, values = run.curve("test/accuracy")
  every = max(1, len(steps) // 10)
  accuracy.plot(
    steps, [100 * v for v in values], **look, markevery=every, label=label
  )
  loss.plot(*run.curve("test/loss"), **look, markevery=every)
  look = {**look, "marker": "", "linewidth": 0.8}
  loss.plot(*run.curve("train/loss"), **look, alpha=0.35)


def _draw_published(accuracy, loss, curve, look, label):
  look = {"color": look["color"], "linestyle": ":", "alpha": 0.5}
  accuracy.plot(
    curve.steps,
    [100 * a for a in curve.accuracy],
    **look,
    label=f"{label}, published",
  )
  loss.plot(curve.steps, curve.loss, **look)


def _labelled(groups) -> list[tuple[str, tuple[run_reader.Run, ...]]]:
  """Gives each group a name of what tells it from the others, by norm."""
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
  """What all the runs have in common."""
  parts = []
  for key in ("model_name", "dataset"):
    values = {config_lib.flatten(run.config)[key] for run in runs}
    if len(values) == 1:
      parts += values
  return " on ".join(parts)
