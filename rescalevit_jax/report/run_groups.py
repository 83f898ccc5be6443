"""All runs in a folder, grouped: those that differ only in the seed."""

from collections.abc import Iterable
import dataclasses
import math
import os
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.models import norms
from rescalevit_jax.models import variants
from rescalevit_jax.runs import run_reader

# Keys with a column, or a meaning, of their own.
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

  Attributes:
    folder: where they lie.
    groups: the finished ones; those of a group differ only in the seed and in
      keys that do not change a run's numbers.
    unfinished: in order of their paths.
    damaged: what could not be read, a line each that says why.
    not_begun: runs that failed before they had a config, a line each.
    varied: the config keys in which the groups differ and that have no column
      of their own.
  """

  folder: pathlib.Path
  groups: tuple[tuple[run_reader.Run, ...], ...]
  unfinished: tuple[run_reader.Run, ...]
  damaged: tuple[str, ...]
  not_begun: tuple[str, ...]
  varied: tuple[str, ...]

  @property
  def finished(self) -> tuple[run_reader.Run, ...]:
    return tuple(run for group in self.groups for run in group)

  def name(self, run: run_reader.Run) -> str:
    """Returns a run's path below the study's folder."""
    name = run.workdir.relative_to(self.folder).as_posix()
    return self.folder.resolve().name if name == "." else name


def collect(folder: str | os.PathLike[str]) -> Study:
  """Reads all runs in a folder and below it, and groups them.

  Raises:
    UserError: there is no such folder, or no run in it.
  """
  folder = pathlib.Path(folder)
  found = run_reader.find(folder)
  whole, damaged = [], list(found.damaged)
  for run in found.runs:
    try:
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
    run_reader.group(finished), key=lambda group: _order(group[0].config)
  )
  return Study(
    folder,
    tuple(groups),
    tuple(run for run in whole if not run.is_finished),
    below(damaged),
    below(found.not_begun),
    varied_keys(group[0].config for group in groups),
  )


def pretrained(config: ml_collections.ConfigDict) -> str:
  """Returns 'yes' or 'no'."""
  return "no" if config.pretrained_path is None else "yes"


def varied_keys(
  configs: Iterable[ml_collections.ConfigDict],
) -> tuple[str, ...]:
  """Returns the keys of no column of their own in which configs differ.

  And what is held out if anything is: it says which images were looked at.
  """
  configs = list(configs)
  varied = [k for k in run_reader.varied_keys(configs) if k not in _NAMING]
  num_val = "data.num_val"
  if num_val not in varied and any(c.data.num_val for c in configs):
    varied.insert(0, num_val)
  # Whether there is a file has a column. Which one follows from the model,
  # unless there are several for one model.
  files = {(c.model_name, c.pretrained_path) for c in configs}
  files = [model for model, file in files if file is not None]
  if "pretrained_path" in varied and len(files) == len(set(files)):
    varied.remove("pretrained_path")
  return tuple(varied)


def _check(run):
  """Raises UserError unless the run's files have what the tables need."""
  if not run.is_finished:
    return
  for key, does in {
    **dict.fromkeys(_NUMBERS, _is_number),
    "devices": lambda value: isinstance(value, list),
    "versions": lambda value: isinstance(value, dict),
  }.items():
    value = run.result.get(key)
    if not does(value):
      raise errors.UserError(
        f"{run.workdir / 'result.json'}: damaged ({key} is {value!r}); delete"
        " it, the run writes it again"
      )


def _is_number(value):
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _order(config):
  return (
    config.dataset,
    list(variants.VARIANTS).index(config.model_name),
    list(norms.NORMS).index(config.model.norm),
    pretrained(config),
    config.image_size,
    # None cannot be compared with a number.
    [
      (value is not None, value or 0)
      for key, value in config_lib.flatten(config).items()
      if key not in _NAMING and not keys.KEYS[key].resumable
    ],
  )
