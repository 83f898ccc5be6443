"""The definition of a config key: default, meaning and valid values."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
  """A config key.

  Attributes:
    default: default value, as in RescaleViT.
    meaning: one line for --help and docs/configuration.md.
    valid: collection of the valid values, or their description.
    check: predicate of the valid values; None if `valid` lists them or if all
      values are valid.
    optional: type of the values other than None; None if None is not valid.
    resumable: True if a run may resume with another value, because the key
      changes its numbers by rounding at most.
  """

  default: Any
  meaning: str
  valid: Any = ""
  check: Callable[[Any], bool] | None = None
  optional: type | None = None
  resumable: bool = False

  @property
  def description(self) -> str:
    """The meaning, with the valid values."""
    valid = self.valid
    if not isinstance(valid, str):
      valid = ", ".join(valid)
    return f"{self.meaning} ({valid})" if valid else self.meaning

  def accepts(self, value: Any) -> bool:
    """Return whether a value of the correct type is valid."""
    if value is None:
      return self.optional is not None
    if self.check is not None:
      return self.check(value)
    return not self.valid or value in self.valid


def positive(default: Any, meaning: str, **kwargs) -> Key:
  """Return the key of a number above 0; see `Key`."""
  return Key(default, meaning, "> 0", lambda x: 0 < x < math.inf, **kwargs)


def nonnegative(default: Any, meaning: str, **kwargs) -> Key:
  """Return the key of a number of at least 0; see `Key`."""
  return Key(default, meaning, ">= 0", lambda x: 0 <= x < math.inf, **kwargs)


def below_one(default: float, meaning: str) -> Key:
  """Return the key of a fraction in [0, 1); see `Key`."""
  return Key(default, meaning, "in [0, 1)", lambda x: 0 <= x < 1)


def up_to_one(default: float, meaning: str) -> Key:
  """Return the key of a fraction in [0, 1]; see `Key`."""
  return Key(default, meaning, "in [0, 1]", lambda x: 0 <= x <= 1)


def positive_up_to_one(default: float, meaning: str) -> Key:
  """Return the key of a fraction in (0, 1]; see `Key`."""
  return Key(default, meaning, "in (0, 1]", lambda x: 0 < x <= 1)


def size(meaning: str) -> Key:
  """Return the key of a model size."""
  meaning = f"{meaning}; None: as `model_name`"
  return positive(None, meaning, optional=int)
