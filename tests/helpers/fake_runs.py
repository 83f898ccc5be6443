"""Folders of untrained runs."""

import json
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.training import experiment

RESULT = {
  "best_accuracy": 0.5,
  "best_step": 200,
  "last_accuracy": 0.4,
  "last_step": 20_000,
  "last_loss": 1.5,
  "examples_evaluated": 10_000,
  "images_per_second": 100.0,
  "seconds": 600.0,
  "parameters": 85_800_000,
  "versions": {"python": "3.11", "jax": "0.10"},
  "devices": ["H100", "H100"],
}


def write(
  workdir: pathlib.Path,
  config: dict | None = None,
  result: dict | None = None,
  steps: int = 3,
) -> pathlib.Path:
  """Write a run's folder.

  Args:
    workdir: folder to create.
    config: overrides of the default config, by dotted key.
    result: overrides of `RESULT`; None for an unfinished run.
    steps: number of lines of metrics, at steps 100, 200, …
  """
  workdir.mkdir(parents=True)
  whole = config_lib.default()
  whole.update_from_flattened_dict(config or {})
  (workdir / "config.json").write_text(config_lib.to_json(whole))
  lines = [
    {"step": 100 * i, "train/loss": 2 / i, "test/loss": 3 / i}
    | {"test/accuracy": 0.1 * i}
    for i in range(1, steps + 1)
  ]
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  if result is not None:
    (workdir / "result.json").write_text(json.dumps(RESULT | result))
  return workdir


def write_with_checkpoint(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> pathlib.Path:
  """Write a finished run whose best checkpoint has the initial weights."""
  state = experiment.create(config).init_state()
  write(workdir, config_lib.flatten(config), {})
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save_best(state, checkpoint.Progress(step=1))
  return workdir
