"""The report's page: one HTML file with table, curves and pictures."""

import base64
from collections.abc import Iterable, Mapping, Sequence
import html
import importlib.resources
import io
import logging
import string
from typing import Any

import jax
from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import run_reader
from rescalevit_jax.training import experiment

_log = logging.getLogger(__name__)

_MAPS = {
  "class_token": "Attention of the class token to the image, per block",
  "rollout": "Attention rollout, residual connections included",
}
_DPI = 110


def render(
  study: run_groups.Study,
  columns: Sequence[tables.Column],
  rows: Sequence[dict[str, Any]],
  notes: Sequence[str],
  curves: Mapping[reference_results.Key, reference_results.Curve],
  index: int | None,
) -> str:
  """Returns the page, which refers to nothing outside itself.

  Args:
    study: the runs.
    columns: of the table.
    rows: of the table.
    notes: what a reader has to know.
    curves: of published runs.
    index: of the test image of the attention maps; None: no maps.
  """
  parts = [*_table(columns, rows), *_curves(study, curves)]
  parts += _diagnostics(study)
  if index is not None:
    parts += _attention(study, index)
  for title, items in tables.left_out(study):
    parts += [f"<h2>{_text(title)}</h2>", "<ul>", *_items(items), "</ul>"]
  template = importlib.resources.files("rescalevit_jax.report") / "page.html"
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    notes="\n".join(_items(notes)), body="\n".join(parts)
  )


def _text(text):
  return html.escape(" ".join(str(text).split()))


def _items(lines):
  return [f"<li>{_text(line)}</li>" for line in lines]


def _table(columns, rows):
  yield "<h2>Results</h2>"
  if not rows:
    yield "<p>No finished run.</p>"
    return
  yield (
    '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
    "<table><caption>A row for all seeds of a recipe. A heading sorts by its"
    " column.</caption><thead><tr>"
  )
  for column in columns:
    yield (
      f'<th scope="col" aria-sort="none"{_class(column)}>'
      f'<button type="button">{_text(column.heading)}</button></th>'
    )
  yield "</tr></thead><tbody>"
  for row in rows:
    yield "<tr>"
    for column in columns:
      yield _cell(column, row)
    yield "</tr>"
  yield "</tbody></table></div>"


def _cell(column, row):
  value, swatch = "", ""
  if column.numeric:
    number = row[column.key]
    value = f' data-value="{"" if number is None else repr(number)}"'
  if column.key == "norm":
    color = plots.norm_color(row["norm"])
    swatch = f'<span class="swatch" style="background:{color}"></span>'
  text = _text(column.text(row))
  return f"<td{_class(column)}{value}>{swatch}{text}</td>"


def _class(column):
  if column.key == "pretrained_path":
    return ' class="path"'
  return ' class="number"' if column.numeric else ""


def _sections(
  runs: Iterable[run_reader.Run],
) -> dict[str, list[run_reader.Run]]:
  """Returns, by title, the runs whose pictures belong side by side."""
  sections = {}
  for run in runs:
    title = (
      f"{run.config.model_name} on {run.config.dataset},"
      f" {run.config.image_size} x {run.config.image_size} pixels"
    )
    sections.setdefault(title, []).append(run)
  return sections


def _curves(study, curves):
  runs = [run for run in (*study.finished, *study.unfinished) if run.metrics]
  if runs:
    yield "<h2>Curves</h2>"
  for title, members in _sections(runs).items():
    figure = plots.curves(members, curves)
    label = f"Test accuracy and loss over training steps, {title}"
    yield (
      f'<figure><div role="img" aria-label="{_text(label)}">'
      f"{plots.svg(figure)}</div><figcaption>{_text(label)}</figcaption>"
      "</figure>"
    )


def _diagnostics(study):
  runs = (*study.finished, *study.unfinished)
  diagnosed = [run for run in runs if diagnostics_plots.is_diagnosed(run)]
  if diagnosed:
    yield "<h2>Diagnostics</h2>"
  for run in diagnosed:
    name = study.name(run)
    figure = diagnostics_plots.draw(run, name)
    label = f"Stream, gradients and attention by depth and time, {name}"
    yield _picture(figure, label)


def _attention(study, index):
  if study.groups:
    yield "<h2>Attention</h2>"
  groups = {group[0].workdir: group for group in study.groups}
  for title, firsts in _sections(g[0] for g in study.groups).items():
    yield f"<h3>{_text(title)}</h3>"
    models, reasons = [], {}
    for i, first in enumerate(firsts, start=1):
      _log.info("attention on %s: model %d of %d", title, i, len(firsts))
      for run in groups[first.workdir]:
        try:
          model = trained_model.load(run.workdir)
          model.name = study.name(run)
          models.append(model)
          break
        except (errors.UserError, jax.errors.JaxRuntimeError) as e:
          reason = str(e).removeprefix(f"{run.workdir}: ")
      else:
        reasons.setdefault(reason, []).extend(
          map(study.name, groups[first.workdir])
        )
    for reason, runs in reasons.items():
      yield _note(f"No map of {', '.join(runs)}: {reason}")
    if not models:
      continue
    try:
      image = _image(firsts[0].config, index)
      for kind, what in _MAPS.items():
        _log.info("attention on %s: drawing %s", title, kind)
        figure = attention_plots.draw(kind, models, image)
        label = f"{what}; test image {index}, best weights of "
        yield _picture(figure, label + ", ".join(m.name for m in models))
    except (errors.UserError, jax.errors.JaxRuntimeError) as e:
      yield _note(f"No maps: {e}")


def _note(reason):
  return f'<p class="reason">{_text(reason)}</p>'


def _image(config, index) -> np.ndarray:
  """Returns a test image, uint8 [H, W, 3]."""
  builder = tfds_builders.open_builder(config.dataset, config.tfds_data_dir)
  if not tfds_builders.is_prepared(builder):
    # No table is worth a download.
    raise errors.UserError(
      f"the data set {config.dataset} is not prepared in"
      f" {builder.data_dir_root}"
    )
  images = experiment.load_dataset(config).test.images
  if index >= len(images):
    raise errors.UserError(
      f"{config.dataset} has no test image {index}, only {len(images)} of them"
    )
  return images[index]


def _picture(figure: figure_lib.Figure, label: str) -> str:
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=_DPI)
  code = base64.b64encode(png.getvalue()).decode("ascii")
  return (
    f'<figure><img alt="{_text(label)}" src="data:image/png;base64,{code}">'
    f"<figcaption>{_text(label)}</figcaption></figure>"
  )
