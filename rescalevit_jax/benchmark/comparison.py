"""Compare measured programs: medians over rounds, ratios between programs."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from rescalevit_jax import config as config_lib
from rescalevit_jax import models
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.models import flops


def describe(
  entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Return medians over the rounds, and median ratios to other programs.

  A ratio is the median of the rounds' ratios.

  Args:
    entry: `run`, `subject` and `rounds`, a list of results of
      `run_worker.measure`.
    entries: all entries of the report.
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
    "settings": report_lib.settings(
      config, [other["run"].config for other in entries]
    ),
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
  mine = config_lib.flatten(config)
  for other in entries:
    theirs = config_lib.flatten(other["run"].config)
    same = all(mine[k] == theirs[k] for k in mine if k != "model.norm")
    if same and other["subject"] != "ours":
      found[f"ratio_to_{other['subject']}"] = _ratio(rounds, other["rounds"])
    if same and other["subject"] == "ours" and theirs["model.norm"] == "LN":
      found["ratio_to_LN"] = _ratio(rounds, other["rounds"])
  return found


def _ratio(ours, theirs):
  return statistics.median(
    a["images_per_second"] / b["images_per_second"]
    for a, b in zip(ours, theirs, strict=True)
  )
