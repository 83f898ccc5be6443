"""Config files and KEY=VALUE overrides, for all commands but `main`."""

from collections.abc import Sequence
import dataclasses
import runpy
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys as keys_lib


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


def methods(path: str) -> dict[str, dict[str, Any]]:
  """Return the `METHODS` of a config file: overrides by name, perhaps none.

  Raises:
    UserError: the file cannot be run.
  """
  try:
    return runpy.run_path(path).get("METHODS", {})
  except Exception as e:  # The file may raise anything.
    raise errors.UserError(f"{path}: {errors.brief(e)}") from e


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes --config.KEY=VALUE and --config.KEY VALUE out of a command line."""
  rest, settings = [], []
  words = list(argv)
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      rest.append(word)
      continue
    setting = word.removeprefix("--config.")
    if "=" not in setting:
      key = keys_lib.KEYS.get(setting)
      if key is not None and isinstance(key.default, bool):
        setting += "=True"  # As in main; its value would be =False.
      elif words and not words[0].startswith("--"):
        setting += f"={words.pop(0)}"
    settings.append(setting)
  return rest, settings
