"""Compute the float32 losses that `measure_gpu` compares with, on the CPU."""

import importlib.metadata
import logging
import math
from typing import Any

import ml_collections

from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import norm_steps
from rescalevit_jax.runtime import atomic_file

_log = logging.getLogger(__name__)


def record(plan: measure_plan.Plan) -> None:
  """Compute the losses of all norms in float32 and write them as JSON.

  Raises:
    UserError: a step failed.
  """
  wanted = {
    name: {**item, "dtype": "float32"}
    for name, item in plan.norms.items()
    if (item["kind"], item["dtype"]) == ("check", "bfloat16")
  }
  found = {}

  def add(name, result):
    if "error" in result:
      raise errors.UserError(f"{name}: {result['error']}")
    found[wanted[name]["norm"]] = result
    _log.info("reference %d/%d  %s", len(found), len(wanted), name)

  norm_steps.run(plan.config, wanted, math.inf, math.inf, add)
  reference = {
    **key(plan.config),
    "jax": importlib.metadata.version("jax"),
    "norms": found,
  }
  atomic_file.write_json(plan.reference, reference)
  _log.info("written: %s", plan.reference)


def key(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return the entries that identify a reference."""
  return {
    "model_name": config.model_name,
    "image_size": config.image_size,
    "images": norm_steps.IMAGES,
  }
