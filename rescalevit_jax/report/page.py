"""Render the report's page: one HTML file with table, curves and pictures."""

import base64
from collections.abc import Iterable, Sequence
import dataclasses
import logging

import jax
from jaxtyping import UInt8
import jinja2
from matplotlib import figure as figure_lib
import ml_collections
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import subjects
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import stored
from rescalevit_jax.report import differences
from rescalevit_jax.report import notes as notes_lib
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import run_reader

_log = logging.getLogger(__name__)

_MAPS = {
  "class_token": "Attention of the class token to the image, per block",
  "rollout": "Attention rollout, including residual connections",
}
_DPI = 110


@dataclasses.dataclass(frozen=True)
class _Picture:
  """A figure with its caption, either inline SVG or the data URL of a PNG."""

  label: str
  svg: str = ""
  url: str = ""


def render(study: run_groups.Study, index: int | None) -> str:
  """Return the page, which needs no other file.

  `index` selects the test image for the attention maps; None omits them.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  _, difference_headings, difference_rows = differences.table(study)
  return environment.get_template("page.html").render(
    notes=notes_lib.describe(study),
    columns=tables.columns(study),
    rows=tables.rows(study),
    norm_color=plots.norm_color,
    difference_headings=difference_headings,
    differences=difference_rows,
    difference_note=differences.NOTE,
    curves=_curves(study),
    diagnostics=_diagnostics(study),
    attention=[] if index is None else _attention(study, index),
    left_out=tables.left_out(study),
  )


def _by_recipe(
  groups: Iterable[Sequence[run_reader.Run]],
) -> dict[str, list[Sequence[run_reader.Run]]]:
  """Return the groups by title: model, dataset, resolution and validation."""
  sections: dict[str, list[Sequence[run_reader.Run]]] = {}
  for group in groups:
    config = group[0].config
    title = (
      f"{config.model_name} on {config.dataset},"
      f" {config.image_size} x {config.image_size} pixels"
    )
    if config.data.num_val:
      title += f", tested on {config.data.num_val} held-out training images"
    sections.setdefault(title, []).append(group)
  return sections


def _curves(study):
  pictures = []
  sections = _by_recipe([run] for run in study.runs if run.metrics)
  for title, groups in sections.items():
    svg = plots.svg(plots.curves([run for (run,) in groups]))
    label = f"Test accuracy and loss over training steps, {title}"
    pictures.append(_Picture(label, svg=svg))
  return pictures


def _diagnostics(study):
  pictures = []
  for run in study.runs:
    if diagnostics_plots.is_diagnosed(run):
      name = study.name(run)
      label = f"Diagnostics over depth and time, {name}"
      pictures.append(_png(diagnostics_plots.draw(run, name), label))
  return pictures


def _attention(study, index):
  """Return title, notes on missing maps, and pictures of each recipe."""
  sections = []
  for title, groups in _by_recipe(study.groups).items():
    models, configs, reasons, pictures = [], [], {}, []
    for i, group in enumerate(groups, start=1):
      _log.info("attention on %s: model %d of %d", title, i, len(groups))
      model, reason = load_any(study, group)
      if model is None:
        reasons.setdefault(reason, []).extend(map(study.name, group))
      else:
        models.append(model)
        configs.append(group[0].config)
    notes = [f"No map of {', '.join(x)}: {why}" for why, x in reasons.items()]
    names = ", ".join(model.name for model in models)
    try:
      if models:
        images = test_images(configs, index)
        for kind, meaning in _MAPS.items():
          _log.info("attention on %s: drawing %s", title, kind)
          label = f"{meaning}; test image {index}, best weights of {names}"
          figure = attention_plots.draw(kind, models, images)
          pictures.append(_png(figure, label))
    except (errors.UserError, jax.errors.JaxRuntimeError) as e:
      notes.append(f"No maps: {e}")
    sections.append((title, notes, pictures))
  return sections


def load_any(
  study: run_groups.Study, group: Sequence[run_reader.Run]
) -> tuple[trained_model.TrainedModel | None, str]:
  """Return the model of the first run that loads, or None and the reason."""
  reason = ""
  for run in group:
    try:
      model = trained_model.load(run.workdir)
      model.name = study.name(run)
      return model, ""
    except (errors.UserError, jax.errors.JaxRuntimeError) as e:
      reason = str(e).removeprefix(f"{run.workdir}: ")
  return None, reason


def test_images(
  configs: Sequence[ml_collections.ConfigDict], index: int
) -> list[UInt8[np.ndarray, "H W 3"]]:
  """Return one test image of the first config's dataset, for each config.

  The images differ only by the first resizing. The dataset must be prepared.
  """
  first, images = configs[0], []
  if not stored.is_prepared(first.dataset, first.tfds_data_dir):
    # A report must not start a download.
    raise errors.UserError(
      f"the dataset {first.dataset} is not prepared in"
      f" {first.tfds_data_dir or '~/tensorflow_datasets'}"
    )
  for config in configs:
    keys = subjects.resized_like(first.data, config.data)
    split = subjects.test_split(
      first.dataset, first.tfds_data_dir, tuple(keys.items())
    )
    if index >= len(split):
      raise errors.UserError(
        f"{first.dataset} has no test image {index}, only {len(split)} of them"
      )
    images.append(split.images[index])
  return images


def _png(figure: figure_lib.Figure, label: str) -> _Picture:
  code = base64.b64encode(plots.render(figure, "png", _DPI)).decode("ascii")
  return _Picture(label, url=f"data:image/png;base64,{code}")
