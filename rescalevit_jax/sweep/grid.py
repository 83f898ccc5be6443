"""Plan the runs of a sweep from config files and a grid of values."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import os
import pathlib
import sys

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import overrides
from rescalevit_jax.models import flops
from rescalevit_jax.runs import folder

_LONGEST_NAME = 255  # Bytes, in usual file systems.
# Keys in the name of every run's folder; see `folder.default_workdir`.
_NAMED = ("dataset", "model_name", "model.norm", "seed")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run to start or resume."""

  workdir: pathlib.Path
  reference: str  # Its config file, FILE or FILE:ARGS.
  settings: tuple[overrides.Setting, ...]  # Overrides of the file.
  config: ml_collections.ConfigDict  # The resulting valid config.

  @property
  def command(self) -> list[str]:
    """Command line that starts the run."""
    return [
      sys.executable,
      "-m",
      "rescalevit_jax.main",
      f"--config={self.reference}",
      f"--workdir={self.workdir}",
      *(f"--config.{setting}" for setting in self.settings),
    ]

  @functools.cached_property
  def step_flops(self) -> float:
    """FLOPs of one step's forward passes, to compare runs."""
    # Slow to import, and not needed by tasks of Slurm.
    from rescalevit_jax.training import experiment

    config = self.config.copy_and_resolve_references()
    # "auto" would initialize the devices; cuDNN has no float32.
    config.dtype, config.model.attention = "float32", "xla"
    try:
      model = experiment.create_model(config, 1)
    except errors.UserError as e:
      raise errors.UserError(f"{self.workdir}: {e}") from e
    return float(flops.forward_flops(model.config) * config.batch)


def repository_config(reference: str) -> str:
  """Return the path of a config of this repository, FILE or FILE:ARGS."""
  configs = pathlib.Path(__file__).parents[2] / "configs"
  if not configs.is_dir():
    raise errors.UserError(
      f"{configs}: no such folder; use a checkout of the repository, which has"
      " the configs"
    )
  return f"{configs}/{reference}"


def plan(
  references: Sequence[str],
  axes: Sequence[Sequence[overrides.Setting]],
  settings: Sequence[overrides.Setting],
  runs_dir: pathlib.Path,
) -> list[PlannedRun]:
  """Return the runs of a sweep: each config at each point of the grid.

  Args:
    references: config files, FILE or FILE:ARGS.
    axes: the settings of each key of the grid; the last key varies fastest.
    settings: overrides for all runs.
    runs_dir: parent of the runs' folders. A folder is named by
      `folder.default_workdir`, followed by the other keys of the grid.
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
        raise errors.UserError(_conflict(planned[run.workdir], run, axes))
      planned[run.workdir] = run
  return list(planned.values())


def _is_named(axis):
  if axis[0].key == "pretrained_path":
    # The name contains scratch or pretrained, but not the file.
    return len([s for s in axis if s.text != "None"]) <= 1
  return axis[0].key in _NAMED


def _plan_run(reference, settings, unnamed, runs_dir):
  config = overrides.load_config(reference, settings)
  values = config_lib.flatten(config)
  name = folder.default_workdir(config).name
  for key in unnamed:
    name += f"-{key}={values[key]}".replace("/", "_")
  if len(os.fsencode(name)) > _LONGEST_NAME:
    raise errors.UserError(
      f"the run's folder would be named {name[:60]}..., which is longer than"
      f" {_LONGEST_NAME} bytes; shorten the dataset or the values of --grid, or"
      " start the runs with another --runs_dir each"
    )
  return PlannedRun(runs_dir / name, reference, settings, config)


def _conflict(a, b, axes):
  """Return the error message of two runs in one folder."""
  both = " and ".join(
    " ".join([f"--config={run.reference}", *map(str, run.settings)])
    for run in (a, b)
  )
  old, new = config_lib.flatten(a.config), config_lib.flatten(b.config)
  keys = [key for key in old if old[key] != new[key]]
  if not keys:
    return f"{both} are the same run; leave one out"
  values = ", ".join(f"{k} ({old[k]!r} and {new[k]!r})" for k in keys)
  advice = "use another --runs_dir"
  if all(axis[0].key != keys[0] for axis in axes):
    advice = (
      f"set {keys[0]} with --grid, which adds it to the name, or {advice}"
    )
  return (
    f"{both} would share the folder {a.workdir}: they differ in {values};"
    f" {advice}"
  )
