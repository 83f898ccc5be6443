"""Execute planned runs that are not finished, here or on a cluster."""

from collections.abc import Iterable, Mapping, Sequence
import logging
import math
import pathlib
import time
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.pretrained import published
from rescalevit_jax.runs import folder
from rescalevit_jax.sweep import device_slots
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import local_scheduler
from rescalevit_jax.sweep import outcome as outcome_lib
from rescalevit_jax.sweep import slurm
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.sweep import time_limit
from rescalevit_jax.training import experiment

_log = logging.getLogger(__name__)


def missing_weights(runs: Iterable[grid.PlannedRun]) -> list[str]:
  """Return the missing files of initial weights that runs need, each once."""
  missing: list[str] = []
  for run in runs:
    path = run.config.pretrained_path
    if path is None or subprocess_run.saved_step(run.workdir):
      continue
    exists = pathlib.Path(path).is_file() or published.is_name(path)
    if not exists and path not in missing:
      missing.append(path)
  return missing


def execute(
  runs: Sequence[grid.PlannedRun],
  runs_dir: pathlib.Path,
  *,
  jobs: int | None = None,
  minutes: float = math.inf,
) -> outcome_lib.Outcome:
  """Execute the unfinished runs on this machine, logging the progress.

  Args:
    runs: the planned runs.
    runs_dir: parent of their folders.
    jobs: runs at a time; None for one per GPU, or one.
    minutes: time limit; if finite, `time_limit.Chooser` orders the runs.
  """
  limit = time_limit.TimeLimit(time.monotonic() + 60 * minutes)
  outcome, left = _unfinished(runs, runs_dir)
  if left:
    _prepare_data(left)
    slots, diverged = device_slots.find(jobs), outcome.failed
    outcome = local_scheduler.LocalScheduler(
      left,
      outcome.done,
      slots,
      limit.stop_times[:1],  # Large checkpoints may take longer to save.
      time_limit.Chooser(runs, limit) if math.isfinite(minutes) else None,
    ).run()
    outcome.failed = diverged + outcome.failed
  if left or outcome.failed:
    outcome.log()
  return outcome


def submit(
  runs: Sequence[grid.PlannedRun],
  runs_dir: pathlib.Path,
  *,
  jobs: int | None = None,
  parameters: Mapping[str, Any],
) -> outcome_lib.Outcome:
  """Submit the unfinished runs as one Slurm array; print the IDs of their jobs.

  At most `jobs` run at a time; `parameters` are those of submitit's
  AutoExecutor.
  """
  outcome, left = _unfinished(runs, runs_dir)
  outcome.log_failed()
  if not left:
    return outcome
  executor = slurm.create_executor(runs_dir / ".submitit", parameters, jobs)
  _prepare_data(left)
  ids = slurm.submit(left, executor)
  array = ids[0].partition("_")[0]
  _log.info(
    "watch with `squeue --jobs=%s` and `tail %s`; stop with `scancel %s`; list"
    " finished runs with the same command and --dry_run",
    array,
    left[0].workdir.parent / "*" / folder.LOG,
    array,
  )
  for job_id, run in zip(ids, left, strict=True):
    print(f"{job_id}  {run.workdir}")
  return outcome


def _unfinished(runs, runs_dir):
  outcome, left = outcome_lib.split_by_result(runs)
  _log.info(
    "%d runs in %s, %d finished", len(runs), runs_dir, len(outcome.done)
  )
  if missing := missing_weights(left):
    raise errors.UserError(
      f"pretrained_path: no such file: {', '.join(missing)}; download the"
      " weights or leave these runs out"
    )
  return outcome, left


def _prepare_data(runs):
  """Prepare the datasets once; concurrent runs would each prepare them."""
  configs = {}
  for run in runs:
    config = run.config
    key = config.dataset, config.tfds_data_dir, *config.data.values()
    configs[key] = config
  for config in configs.values():
    experiment.load_dataset(config)
