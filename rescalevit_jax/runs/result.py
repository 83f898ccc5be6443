"""result.json: what a finished run says of itself."""

import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any

import jax

from rescalevit_jax import errors
from rescalevit_jax.runs import checkpoint


def create(
  progress: checkpoint.Progress, *, images_per_second: float, parameters: int
) -> dict[str, Any]:
  """Returns what is written at the end of a run.

  Args:
    progress: of the run.
    images_per_second: of training.
    parameters: how many the model has.
  """
  return {
    "best_accuracy": progress.best_accuracy,
    "best_step": progress.best_step,
    "last_accuracy": progress.last_accuracy,
    "last_step": progress.last_step,
    "last_loss": progress.last_loss,
    "examples_evaluated": progress.examples_evaluated,
    "images_per_second": images_per_second,
    "seconds": progress.seconds,
    "skipped_steps": progress.skipped_steps,
    "parameters": parameters,
    "versions": {
      "python": platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
      },
    },
    "devices": [str(d.device_kind) for d in jax.devices()],
  }


def read(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """Returns result.json of a finished run, or None.

  Raises:
    UserError: it is damaged.
  """
  path = pathlib.Path(workdir) / "result.json"
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
    for name in ("last_accuracy", "best_accuracy", "best_step"):
      value = result[name]
      if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return result
  except FileNotFoundError:
    return None
  except (
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
  ) as e:
    raise errors.UserError(
      f"{path}: damaged ({e}); delete it, the run writes it again"
    ) from e


def accuracies(result: dict[str, Any]) -> str:
  """Returns the end of a line of the log."""
  return (
    f"test accuracy {result['last_accuracy']:.4f}, best"
    f" {result['best_accuracy']:.4f} at step {result['best_step']}"
  )
