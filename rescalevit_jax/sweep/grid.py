"""From config files and a grid of values to the runs of a sweep."""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
import sys
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys as keys_lib
from rescalevit_jax.runs import folder

# Told by the name of every run's folder: see `run_folder.default_workdir`.
_NAMED = ("dataset", "model_name", "model.norm", "seed")


@dataclasses.dataclass(frozen=True)
class Setting:
  """A config key with a value, as `--config.KEY=VALUE` gives it.

  Attributes:
    key: a key of `config_keys.KEYS`.
    text: the value as written.
  """

  key: str
  text: str

  def __str__(self) -> str:
    return f"{self.key}={self.text}"


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
  settings: tuple[Setting, ...]
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


def parse_setting(text: str, flag: str) -> Setting:
  """Parses KEY=VALUE.

  Args:
    text: to be parsed.
    flag: where it stood, for the message.

  Raises:
    UserError: it is not of this form, or there is no such key.
  """
  key, equals, value = text.partition("=")
  keys_lib.check_key(key)
  if not equals:
    raise errors.UserError(f"{flag}: {text!r} has no value; write KEY=VALUE")
  return Setting(key, value)


def parse_axis(text: str) -> list[Setting]:
  """Parses KEY=VALUE,VALUE,... of --grid.

  Raises:
    UserError: it is not of this form, or there is no such key.
  """
  whole = parse_setting(text, "--grid")
  values = whole.text.split(",")
  for i, value in enumerate(values):
    if not value:
      raise errors.UserError(f"--grid: {text!r} has an empty value")
    if value in values[:i]:
      raise errors.UserError(f"--grid: {text!r} has {value} twice")
  return [Setting(whole.key, value) for value in values]


def plan(
  references: Sequence[str],
  axes: Sequence[Sequence[Setting]],
  settings: Sequence[Setting],
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


def load_config(
  reference: str, settings: Sequence[Setting]
) -> ml_collections.ConfigDict:
  """Returns the config that `main` would make of the same arguments.

  Args:
    reference: FILE, or FILE:ARGS for get_config(ARGS).
    settings: what is changed in it.

  Raises:
    UserError: the file or a value does not do.
  """
  argv = ["", f"--config={reference}"]
  argv += [f"--config.{s}" for s in settings if s.text != "None"]
  values = flags.FlagValues()
  try:
    flag = config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=argv
    )
    values(argv)
    if flag.value is None:
      raise errors.UserError("get_config() returns None")
    flag.value.update_from_flattened_dict(
      {s.key: None for s in settings if s.text == "None"}
    )
    config_lib.validate(flag.value)
    return flag.value
  except Exception as e:  # get_config() may raise anything.
    why = errors.explain(e, (errors.UserError, flags.Error))
    raise errors.UserError(f"--config={reference}: {why}") from e


def _is_named(axis: Sequence[Setting]) -> bool:
  if axis[0].key == "pretrained_path":
    # Names say scratch or pretrained, not which file.
    return len([s for s in axis if s.text != "None"]) <= 1
  return axis[0].key in _NAMED


def _plan_run(reference, settings, unnamed, runs_dir) -> PlannedRun:
  config = load_config(reference, settings)
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
