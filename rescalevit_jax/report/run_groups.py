"""Group the runs of a folder that differ only in the seed."""

from collections.abc import Iterable
import dataclasses
import os
import pathlib
import sys
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader

# Keys with their own column or meaning.
_NAMING = ("dataset", "model_name", "model.norm", "image_size", "seed")
_NUMBERS = (
  "best_accuracy",
  "best_step",
  "last_accuracy",
  "last_step",
  "last_loss",
  "images_per_second",
  "seconds",
  "parameters",
)


@dataclasses.dataclass(frozen=True)
class Study:
  """All runs in a folder.

  The runs of a group are finished, and differ only in the seed and in keys that
  do not affect a run's results.
  """

  folder: pathlib.Path
  groups: tuple[tuple[run_reader.Run, ...], ...]
  diverged: tuple[run_reader.Run, ...]  # In order of their paths.
  unfinished: tuple[run_reader.Run, ...]  # Others, in order of their paths.
  damaged: tuple[str, ...]  # Unreadable; a line each, with the reason.
  not_begun: tuple[str, ...]  # Failed before writing a config; a line each.
  varied: tuple[str, ...]  # Keys without a column in which groups differ.

  @property
  def finished(self) -> tuple[run_reader.Run, ...]:
    return tuple(run for group in self.groups for run in group)

  @property
  def runs(self) -> tuple[run_reader.Run, ...]:
    """All readable runs, finished ones first."""
    return (*self.finished, *self.diverged, *self.unfinished)

  def num_diverged(self, group: tuple[run_reader.Run, ...]) -> int:
    """Return the number of diverged runs of a group's recipe."""
    recipe = run_reader.recipe(group[0].config)
    return sum(run_reader.recipe(x.config) == recipe for x in self.diverged)

  def name(self, run: run_reader.Run) -> str:
    """Return a run's path relative to the study's folder."""
    name = run.workdir.relative_to(self.folder).as_posix()
    return self.folder.resolve().name if name == "." else name


def collect(folder: str | os.PathLike[str]) -> Study:
  """Read all runs below a folder and group them."""
  folder = pathlib.Path(folder)
  found = run_reader.find(folder)
  whole, damaged = [], list(found.damaged)
  for run in found.runs:
    try:
      if run.is_finished:
        _check(run)
      whole.append(run)
    except errors.UserError as e:
      damaged.append(str(e))

  def below(lines):
    return tuple(
      sorted(line.removeprefix(f"{folder}{os.sep}") for line in lines)
    )

  finished = [run for run in whole if run.is_finished]
  groups = sorted(
    run_reader.group(finished), key=lambda group: order(group[0].config)
  )
  return Study(
    folder,
    tuple(groups),
    tuple(run for run in whole if result_lib.has_diverged(run.result)),
    tuple(run for run in whole if run.result is None),
    below(damaged),
    below(found.not_begun),
    varied_keys(group[0].config for group in groups),
  )


def pretrained(config: ml_collections.ConfigDict) -> str:
  """Return 'yes' if a config has initial weights, else 'no'."""
  return "no" if config.pretrained_path is None else "yes"


def varied_keys(
  configs: Iterable[ml_collections.ConfigDict],
) -> tuple[str, ...]:
  """Return the keys without a column in which configs differ.

  data.num_val is included if any config sets it, since it replaces the test
  split by held-out training images.
  """
  configs = list(configs)
  varied = [k for k in run_reader.varied_keys(configs) if k not in _NAMING]
  num_val = "data.num_val"
  if num_val not in varied and any(c.data.num_val for c in configs):
    varied.insert(0, num_val)
  # The column `pretrained` is yes or no. Show the file as a varied key only
  # if a model has several files.
  files = {(c.model_name, c.pretrained_path) for c in configs}
  models = [model for model, file in files if file is not None]
  if "pretrained_path" in varied and len(models) == len(set(models)):
    varied.remove("pretrained_path")
  return tuple(varied)


def _check(run):
  """Raise UserError unless the result has the values of the tables."""
  result = run.result
  valid = {key: _is_number(result.get(key)) for key in _NUMBERS}
  for key in ("best_accuracy", "last_accuracy"):
    valid[key] &= 0 <= result[key] <= 1
  valid["examples_evaluated"] = _is_number(result.get("examples_evaluated", 0))
  valid["devices"] = isinstance(result.get("devices"), list)
  valid["versions"] = isinstance(result.get("versions"), dict)
  for key, is_valid in valid.items():
    if not is_valid:
      raise errors.UserError(
        f"{run.workdir / 'result.json'}: damaged ({key} is"
        f" {result.get(key)!r}); delete it and resume the run, which writes it"
        " again"
      )


def _is_number(value):
  return type(value) in (int, float) and abs(value) <= sys.float_info.max


def order(config: ml_collections.ConfigDict) -> tuple[Any, ...]:
  """Return a key that sorts configs by dataset, model, norm and weights."""
  return (
    config.dataset,
    list(vit_config.VARIANTS).index(config.model_name),
    list(norms.NORMS).index(config.model.norm),
    pretrained(config),
    config.image_size,
    # None does not compare with numbers.
    [
      (value is not None, value or 0)
      for key, value in config_lib.flatten(config).items()
      if key not in _NAMING and not keys.KEYS[key].resumable
    ],
  )
