"""Config files and KEY=VALUE overrides on the command lines of all programs."""

from collections.abc import Sequence
import functools
import os
import re
import runpy
import traceback
from typing import Any, NamedTuple

from absl import flags
import ml_collections
from ml_collections import config_flags

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys as keys_lib

_PREFIX = re.compile(r"--?config\.")


class Setting(NamedTuple):
  """A config key with its value as written, as in `--config.KEY=VALUE`."""

  key: str
  text: str

  def __str__(self) -> str:
    return f"{self.key}={self.text}"


def parse_setting(text: str, flag: str) -> Setting:
  """Parse KEY=VALUE, the argument of a flag."""
  key, equals, value = text.partition("=")
  keys_lib.check_key(key)
  if not equals:
    raise errors.UserError(f"{flag}: {text!r} has no value; write KEY=VALUE")
  return Setting(key, value)


def parse_axis(text: str) -> list[Setting]:
  """Parse KEY=VALUE,VALUE,... of --grid."""
  whole = parse_setting(text, "--grid")
  values = whole.text.split(",")
  for i, value in enumerate(values):
    if not value:
      raise errors.UserError(
        f"--grid: {text!r} has an empty value; give a value"
      )
    if value in values[:i]:
      raise errors.UserError(
        f"--grid: {text!r} has {value} twice; give each value once"
      )
  return [Setting(whole.key, value) for value in values]


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[Setting]]:
  """Split a command line into other arguments and config overrides.

  An override is `--config.KEY=VALUE`, `--config.KEY VALUE`, or `--config.KEY`
  for True.
  """
  rest: list[str] = []
  settings: list[Setting] = []
  words = list(argv)
  while words:
    word = words.pop(0)
    if word == "--":  # The end of the flags.
      return [*rest, word, *words], settings
    prefix = _PREFIX.match(word)
    if not prefix:
      rest.append(word)
      continue
    text = word[prefix.end() :]
    if "=" not in text:
      keys_lib.check_key(text)
      if isinstance(keys_lib.KEYS[text].default, bool):
        text += "=True"
      elif words and not words[0].startswith("--"):
        text += f"={words.pop(0)}"
    settings.append(parse_setting(text, f"--config.{text}"))
  return rest, settings


def load_config(
  reference: str, settings: Sequence[Setting]
) -> ml_collections.ConfigDict:
  """Load a config with overrides; the last override of a key wins.

  The reference is FILE, or FILE:ARGS for get_config(ARGS).
  """
  argument = f"--config={reference}"
  try:
    return _parse(config_flags.DEFINE_config_file, [argument], settings)
  except Exception as e:  # get_config() may raise any type.
    raise errors.UserError(f"{argument}: {_explain(e)}") from e


def _explain(error):
  """Return an exception's message; if it may be unclear, with type and line."""
  message = str(error)
  if "Traceback" in message:  # ml_collections quotes a whole one.
    message = message.splitlines()[-1]
  if isinstance(error, errors.UserError | flags.Error):
    return message
  frame = traceback.extract_tb(error.__traceback__)[-1]
  kind = type(error).__name__
  return f"{message} ({kind}, {frame.filename}:{frame.lineno})"


def update_config(
  config: ml_collections.ConfigDict, settings: Sequence[Setting]
) -> ml_collections.ConfigDict:
  """Return a config with overrides."""
  define = functools.partial(config_flags.DEFINE_config_dict, config=config)
  try:
    return _parse(define, [], settings)
  except (AttributeError, flags.Error, TypeError, ValueError) as e:
    raise errors.UserError(str(e)) from e


def _parse(define, argv, settings):
  texts = {setting.key: setting.text for setting in settings}
  argv = ["", *argv]
  argv += [f"--config.{key}={x}" for key, x in texts.items() if x != "None"]
  values = flags.FlagValues()
  flag = define(name="config", flag_values=values, sys_argv=argv)
  values(argv)
  if flag.value is None:
    raise errors.UserError("get_config() returns None; return a config")
  flag.value.update_from_flattened_dict(
    {key: None for key, text in texts.items() if text == "None"}
  )
  config_lib.validate(flag.value)
  if (path := flag.value.pretrained_path) is not None:
    flag.value.pretrained_path = os.path.expanduser(path)
  return flag.value


def methods(path: str) -> dict[str, dict[str, Any]]:
  """Return `METHODS` of a config file: overrides by method name, or {}."""
  try:
    return runpy.run_path(path).get("METHODS", {})
  except Exception as e:  # The file may raise any type.
    raise errors.UserError(
      f"{path}: cannot be run ({errors.brief(e)}); correct the file"
    ) from e
