"""result.json: the outcome of a run.

A run is finished if the file exists with status "finished", the default. A
diverged run has status "diverged" with `step` and `error`. A run that stopped
for another reason has no result.json; the same command resumes it.
"""

from collections.abc import Mapping
import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any, TypeGuard

import jax
import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runtime import atomic_file

FINISHED, DIVERGED = "finished", "diverged"

# Required numbers, by status.
_NUMBERS = {
  FINISHED: ("last_accuracy", "best_accuracy", "best_step"),
  DIVERGED: ("step",),
}
# Scores of the last weights, from eval.json.
_SCORES = (
  "split",
  "accuracy_interval",
  "top5",
  "calibration_error",
  "train_accuracy",
  "skipped_images",
)


def create(
  progress: checkpoint.Progress,
  evaluation: Mapping[str, Any],
  *,
  images_per_second: float,
  parameters: int,
) -> dict[str, Any]:
  """Return the result of a finished run; `evaluation` is from eval.json."""
  return {
    "status": FINISHED,
    "best_accuracy": progress.best_accuracy,
    "best_step": progress.best_step,
    "last_accuracy": progress.last_accuracy,
    "last_step": progress.last_step,
    "last_loss": progress.last_loss,
    "examples_evaluated": progress.examples_evaluated,
    **{key: evaluation[key] for key in _SCORES if key in evaluation},
    "images_per_second": images_per_second,
    "seconds": progress.seconds,
    "skipped_steps": progress.skipped_steps,
    "parameters": parameters,
    "dtype": progress.dtype,
    "versions": {
      "python": platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
      },
    },
    "devices": [str(d.device_kind) for d in jax.devices()],
  }


def diverged(step: int, error: str) -> dict[str, Any]:
  """Return the result of a run whose loss or gradient is not finite."""
  return {"status": DIVERGED, "step": step, "error": error}


def write(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Write result.json."""
  atomic_file.write_json(workdir / folder_lib.RESULT, result)


def read(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """Return result.json, None if the run has not ended."""
  path = pathlib.Path(workdir) / folder_lib.RESULT
  try:
    result = {
      "status": FINISHED,  # Earlier versions wrote none.
      **json.loads(path.read_text(encoding="utf-8")),
    }
    if result["status"] not in list(_NUMBERS):
      raise ValueError(f"status is {result['status']!r}")
    for name in _NUMBERS[result["status"]]:
      value = result[name]
      if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    if has_diverged(result) and not isinstance(result["error"], str):
      raise ValueError(f"error is {result['error']!r}")
    return result
  except FileNotFoundError:
    return None
  except errors.DAMAGED_JSON as e:
    raise errors.UserError(
      f"{path}: damaged ({e}); delete it, the run writes it again"
    ) from e


def is_finished(result: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
  """Return whether a run with this result needs no further training."""
  return result is not None and result["status"] == FINISHED


def has_diverged(result: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
  """Return whether a run with this result has diverged."""
  return result is not None and result["status"] == DIVERGED


def read_same_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any] | None:
  """Return the result of this config's run, None if it must be trained.

  Raise UserError if the folder holds a run of another config. A run without
  result and checkpoints may change its config. So may a diverged run without
  checkpoints; its result is then ignored.
  """
  result = read(workdir)
  saved = any(folder_lib.saved_steps(workdir, x) for x in ("last", "best"))
  if result is None and not saved:
    return None
  old = folder_lib.read_config(workdir)
  if old is None:
    raise errors.UserError(
      f"{workdir}: holds a run without its {folder_lib.CONFIG}; choose another"
      " --workdir"
    )
  differing = config_lib.differing_keys(old, config)
  if differing and has_diverged(result) and not saved:
    return None
  if is_finished(result) and config.total_steps > old.total_steps:
    raise errors.UserError(
      f"{workdir}: finished after {old.total_steps} steps, and its"
      " learning-rate schedule has ended; start a new run from its weights:"
      f" python -m rescalevit_jax.export --workdir={workdir}"
      " --output=weights.npz, then --config.pretrained_path=weights.npz in"
      " another --workdir"
    )
  if differing:
    advice = "choose another --workdir or the old values"
    if any(x.startswith("data.test_split ") for x in differing):
      advice += "; --config.eval_split evaluates on another split"
    raise errors.UserError(
      f"{workdir}: holds a run of another config: {', '.join(differing)};"
      f" {advice}"
    )
  return result


def accuracies(result: dict[str, Any]) -> str:
  """Return the accuracies of a finished run as part of a log line."""
  return (
    f"test accuracy {result['last_accuracy']:.4f}, best"
    f" {result['best_accuracy']:.4f} at step {result['best_step']}"
  )
