"""Compare measured programs: medians over rounds, ratios between programs."""

from collections.abc import Iterable, Mapping, Sequence
import statistics
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import models
from rescalevit_jax.models import flops
from rescalevit_jax.sweep import grid

# Config keys with a column in the table of a report.
_COLUMNS = ("model_name", "model.norm", "image_size", "batch", "dtype")


def settings(
  config: ml_collections.ConfigDict,
  configs: Iterable[ml_collections.ConfigDict],
) -> dict[str, Any]:
  """Return the keys without a column in which a config differs from others."""
  others = [config_lib.flatten(other) for other in configs]
  return {
    key: value
    for key, value in config_lib.flatten(config).items()
    if key not in _COLUMNS and any(value != other[key] for other in others)
  }


def same_but(run: grid.PlannedRun, other: grid.PlannedRun, *keys: str) -> bool:
  """Return True if the configs of two runs differ only in these keys."""
  mine = config_lib.flatten(run.config)
  theirs = config_lib.flatten(other.config)
  return all(mine[key] == theirs[key] for key in mine if key not in keys)


def is_first(run: grid.PlannedRun, runs: Sequence[grid.PlannedRun]) -> bool:
  """Return False if an earlier run differs in the norm only."""
  return next(x for x in runs if same_but(run, x, "model.norm")) is run


def describe(
  entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Return medians over the rounds, and of the ratios to other programs.

  An entry has `run`, `subject` and `rounds`: results of `run_worker.measure`.
  """
  rounds = entry["rounds"]
  config = entry["run"].config
  medians = {
    key: statistics.median(r[key] for r in rounds)
    for key, value in rounds[0].items()
    if isinstance(value, int | float)
  }
  speeds = [r["images_per_second"] for r in rounds]
  found = {
    "run": entry["run"].workdir.name,
    "norm": config.model.norm if entry["subject"] == "ours" else "LN",
    "model": config.model_name,
    "image_size": config.image_size,
    "batch": config.batch,
    "dtype": rounds[0]["dtype"],
    "subject": entry["subject"],
    "settings": settings(config, [x["run"].config for x in entries]),
    **medians,
    "images_per_second_range": [min(speeds), max(speeds)],
    "rounds": rounds,
  }
  if entry["subject"] != "ours":
    return found
  model = models.create(
    config.model_name,
    num_classes=10,
    image_size=config.image_size,
    **{**config.model, "attention": "xla"},
  )
  gradients = 2 if config.sam_rho else 1
  training = 3 * gradients * flops.forward_flops(model.config)
  found["training_flops_per_image"] = training
  found["peak_share"] = statistics.median(
    training * r["images_per_second"] / r["peak_flops_per_second"]
    for r in rounds
  )
  for other in entries:
    if not same_but(entry["run"], other["run"], "model.norm"):
      continue
    others = [r["images_per_second"] for r in other["rounds"]]
    if other["subject"] != "ours":
      found[f"ratio_to_{other['subject']}"] = ratio(speeds, others)
    elif other["run"].config.model.norm == "LN":
      found["ratio_to_LN"] = ratio(speeds, others)
  return found


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
  """Return the median ratio of paired measurements."""
  return statistics.median(x / y for x, y in zip(a, b, strict=True))
