"""Write a study in the form of RescaleViT's page: tables and figures."""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.report import page
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import markdown

_INTRO = """\
Test accuracy in %. Best: the highest of all evaluations, so it is selected on
the test images. Last: after the last step. ± is the standard deviation over
seeds. Published: RescaleViT's README and logs, one run each on an RTX 3090.
"""


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A planned recipe with its runs."""

  config: ml_collections.ConfigDict  # Of a planned run.
  planned: int  # Number of runs.
  settings: Sequence[str]  # Keys that differ between recipes, KEY=VALUE.
  runs: Sequence[run_reader.Run]  # So far, finished ones first.
  row: Mapping[str, Any] | None  # Of `tables.rows`, if a run has finished.

  @property
  def label(self):
    """The norm and the settings."""
    start = ["pretrained"] if self.config.pretrained_path else []
    return ", ".join([self.config.model.norm, *start, *self.settings])

  @property
  def weights(self):
    """The origin of the weights, as text."""
    start = "pretrained" if self.config.pretrained_path else "from scratch"
    unfinished = [] if self.row else [self.state]
    return ", ".join([start, *self.settings, *unfinished])

  @property
  def state(self):
    """The progress of the runs, as text."""
    if not self.runs:
      return "not run"
    finished = sum(run.is_finished for run in self.runs)
    missing = f" of {self.planned}" * (finished < self.planned)
    parts = [f"{finished}{missing} finished"] if finished else []
    for run in self.runs[finished:]:
      diverged = ", diverged" * result_lib.has_diverged(run.result)
      parts.append(f"step {run.step} of {run.config.total_steps}{diverged}")
    return "; ".join(parts)


def write(
  configs: Sequence[ml_collections.ConfigDict],
  folder: pathlib.Path,
  index: int,
) -> list[pathlib.Path]:
  """Write study.md, and the figures of each model; return their paths.

  Args:
    configs: configs of the planned runs, of one dataset.
    folder: folder of the runs, and of the files.
    index: index of the test image for the attention maps.
  """
  study = run_groups.collect(folder)
  columns = tables.columns(study)
  text = [f"# RescaleViT's study on {configs[0].dataset}", "", _INTRO]
  paths = [folder / "study.md"]
  by_model: dict[str, list[ml_collections.ConfigDict]] = {}
  for config in sorted(configs, key=run_groups.order):
    by_model.setdefault(config.model_name, []).append(config)
  for model, model_configs in by_model.items():
    entries = _entries(model_configs, study)
    cells = [_cells(entry, columns) for entry in entries]
    values = map(dict.values, cells)
    text += [f"## {model}", "", markdown.table("lrrrrrrl", cells[0], values)]
    missing = [f"{x.label}: {x.state}" for x in entries if not x.runs]
    attention, problems = _attention(entries, study, index)
    for name, title, figure in (
      ("curves", "Test loss and accuracy", _curves(entries)),
      ("attention", "Attention of head 0", attention),
    ):
      if figure is not None:
        paths.append(folder / f"{name}-{model}.png")
        plots.save(figure, paths[-1])
        text += [f"![{title}]({paths[-1].name})", ""]
    text += [*(f"- {markdown.escape(x)}" for x in missing + problems), ""]
  atomic_file.write(paths[0], "\n".join(text).rstrip() + "\n")
  return paths


def _entries(configs, study):
  """Return an entry for each recipe, in the order of the configs."""
  recipe = run_reader.recipe
  runs: dict[Any, list[run_reader.Run]] = {}
  for run in study.runs:
    runs.setdefault(recipe(run.config), []).append(run)
  rows = {
    recipe(group[0].config): row
    for group, row in zip(study.groups, tables.rows(study), strict=True)
  }
  varied = run_groups.varied_keys(configs)
  if len({config.image_size for config in configs}) > 1:
    varied = ("image_size", *varied)
  planned = collections.Counter(map(recipe, configs))
  entries = []
  for key, config in {recipe(x): x for x in configs}.items():
    values = config_lib.flatten(config)
    settings = [f"{name}={values[name]}" for name in varied]
    entries.append(
      _Entry(config, planned[key], settings, runs.get(key, []), rows.get(key))
    )
  return entries


def _cells(entry, columns):
  """Return the displayed row of a recipe, by heading."""
  shown = {column.key: column.text for column in columns}
  published = reference_results.find(entry.config)

  def ours(key):
    return shown[key](entry.row) if entry.row else markdown.NOTHING

  def theirs(name, factor):
    value = getattr(published, name, None)
    return markdown.NOTHING if value is None else f"{factor * value:.1f}"

  return {
    "norm": entry.label,
    "best": ours("best_accuracy_mean"),
    "last": ours("last_accuracy_mean"),
    "published best": theirs("best_accuracy", 100),
    "published last": theirs("last_accuracy", 100),
    "minutes": ours("minutes_mean"),
    "published minutes": theirs("minutes", 1),
    "state": entry.state,
  }


def _curves(entries):
  panels = {
    entry.label: entry.runs
    for entry in entries
    if any(run.metrics for run in entry.runs)
  }
  return plots.loss_and_accuracy(panels) if panels else None


def _attention(entries, study, index):
  """Return the figure, or None, and a line for each model that it lacks."""
  models, configs, problems = [], [], []
  for entry in entries:
    if not entry.runs:
      continue
    model, reason = page.load_any(study, entry.runs)
    if model is None:
      problems.append(f"No attention of {entry.label}: {reason}")
    else:
      model.name = entry.weights
      models.append(model)
      configs.append(entry.config)
  if not models:
    return None, problems
  try:
    images = page.test_images(configs, index)
    return attention_plots.draw("tokens", models, images), problems
  except (errors.UserError, jax.errors.JaxRuntimeError) as e:
    return None, [*problems, f"No attention: {e}"]
