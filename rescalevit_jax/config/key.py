"""What a config key is, and which values it takes."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
  """A config key.

  Attributes:
    default: its value if nothing is said, as in RescaleViT.
    meaning: one line for the README and for --help.
    valid: what a value must be, or a collection of the valid ones.
    check: whether a value is valid; None if `valid` lists them or all are.
    optional: the type of a value that may also be None.
    resumable: whether a run may go on with another value: it does not change
      the run's numbers, by more than rounding in the case of batch_eval.
  """

  default: Any
  meaning: str
  valid: Any = ""
  check: Callable[[Any], bool] | None = None
  optional: type | None = None
  resumable: bool = False

  def accepts(self, value: Any) -> bool:
    """Returns whether a value, of the right type, is valid."""
    if value is None:
      return self.optional is not None
    if self.check is not None:
      return self.check(value)
    return not self.valid or value in self.valid


def positive(default: Any, meaning: str, **kwargs) -> Key:
  """Returns the key of a number above 0; the rest is as in `Key`."""
  return Key(default, meaning, "> 0", lambda x: 0 < x < math.inf, **kwargs)


def at_least(low: int, default: Any, meaning: str, **kwargs) -> Key:
  """Returns the key of a number that is `low` or more."""
  return Key(
    default, meaning, f">= {low}", lambda x: low <= x < math.inf, **kwargs
  )


def below_one(default: float, meaning: str, **kwargs) -> Key:
  """Returns the key of a share that is not the whole."""
  return Key(default, meaning, "in [0, 1)", lambda x: 0 <= x < 1, **kwargs)


def size(meaning: str) -> Key:
  """Returns the key of one of the model's sizes."""
  meaning = f"{meaning}; None: as in the table of models"
  return positive(None, meaning, optional=int)
