"""From config files and a grid of values to the runs of a sweep."""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
import sys
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import overrides
from rescalevit_jax.runs import folder

# Told by the name of every run's folder: see `run_folder.default_workdir`.
_NAMED = ("dataset", "model_name", "model.norm", "seed")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run that is yet to be started, or started again.

  Attributes:
    workdir: its folder.
    reference: its config file, FILE or FILE:ARGS.
    settings: what the run changes in that.
    config: what comes of both; valid.
  """

  workdir: pathlib.Path
  reference: str
  settings: tuple[overrides.Setting, ...]
  config: ml_collections.ConfigDict

  @property
  def command(self) -> list[str]:
    """The program with its arguments."""
    return [
      sys.executable,
      "-m",
      "rescalevit_jax.main",
      f"--config={self.reference}",
      f"--workdir={self.workdir}",
      *(f"--config.{setting}" for setting in self.settings),
    ]


def plan(
  references: Sequence[str],
  axes: Sequence[Sequence[overrides.Setting]],
  settings: Sequence[overrides.Setting],
  runs_dir: pathlib.Path,
) -> list[PlannedRun]:
  """Returns the runs of a sweep: each config with each point of the grid.

  Args:
    references: config files, FILE or FILE:ARGS.
    axes: of the grid, each the settings of one key; the last varies fastest.
    settings: of all runs.
    runs_dir: where their folders lie. A folder's name is that of
      `run_folder.default_workdir`, and the grid's keys of which it says
      nothing.

  Raises:
    UserError: a config file, a key or a value does not do, or two runs would
      share a folder.
  """
  given = [axis[0].key for axis in axes] + [s.key for s in settings]
  for key in given:
    if given.count(key) > 1:
      raise errors.UserError(f"{key} is given twice; give each key once")
  unnamed = [axis[0].key for axis in axes if not _is_named(axis)]
  planned: dict[pathlib.Path, PlannedRun] = {}
  for reference in references:
    for point in itertools.product(*axes):
      run = _plan_run(reference, (*settings, *point), unnamed, runs_dir)
      if run.workdir in planned:
        raise errors.UserError(_conflict(planned[run.workdir], run))
      planned[run.workdir] = run
  return list(planned.values())


def _is_named(axis: Sequence[overrides.Setting]) -> bool:
  if axis[0].key == "pretrained_path":
    # Names say scratch or pretrained, not which file.
    return len([s for s in axis if s.text != "None"]) <= 1
  return axis[0].key in _NAMED


def _plan_run(reference, settings, unnamed, runs_dir) -> PlannedRun:
  config = overrides.load_config(reference, settings)
  values = config_lib.flatten(config)
  name = "-".join(
    [
      folder.default_workdir(config).name,
      *(f"{key}={values[key]}".replace("/", "_") for key in unnamed),
    ]
  )
  return PlannedRun(runs_dir / name, reference, settings, config)


def _conflict(a: PlannedRun, b: PlannedRun) -> str:
  what = " and ".join(
    " ".join([f"--config={run.reference}", *map(str, run.settings)])
    for run in (a, b)
  )
  old, new = config_lib.flatten(a.config), config_lib.flatten(b.config)
  keys: list[Any] = [key for key in old if old[key] != new[key]]
  if not keys:
    return f"{what} are the same run; leave one out"
  values = ", ".join(f"{k} ({old[k]!r} and {new[k]!r})" for k in keys)
  return (
    f"{what} would share the folder {a.workdir}: they differ in {values}; give"
    f" {keys[0]} by --grid, so that the name tells it, or another --runs_dir to"
    " one of them"
  )
