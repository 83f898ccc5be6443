"""Submit the runs of a sweep to Slurm, as one array, through submitit.

Slurm warns a job before it preempts or times it out. submitit then calls
`Task.checkpoint`, which stops the run after a checkpoint, and requeues the job,
which resumes the run. A preemption may come with SIGTERM to all processes of
the job instead, as `scancel` does; see `Task.__call__`.
"""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import os
import pathlib
import signal
import subprocess
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import outcome as outcome_lib
from rescalevit_jax.sweep import subprocess_run

# Each time-out is progress, so their number is not limited; submitit's default
# is 3.
_MAX_TIMEOUTS = 1000
# Slurm's variables that a user or a site sets, not a job.
_USER_VARIABLES = (
  "SLURM_CONF",
  "SBATCH_ACCOUNT",
  "SBATCH_PARTITION",
  "SBATCH_QOS",
  "SBATCH_RESERVATION",
)


class Task:
  """A run as a submitit job: pickled here, called on a compute node."""

  def __init__(self, command: Sequence[str], workdir: pathlib.Path, cwd: str):
    self._command = list(command)
    self._workdir = workdir
    self._cwd = cwd
    self._process: subprocess.Popen | None = None
    self._stopping = False

  def __call__(self) -> None:
    """Run until the end; requeue the job if Slurm preempts it with SIGTERM.

    Raises:
      RuntimeError: the run failed or the job is being canceled.
    """
    os.chdir(self._cwd)
    self._process = subprocess_run.start(self._command, self._workdir, {})
    self._wait(self._process)
    code = self._process.wait()
    reason = outcome_lib.why_not_finished(self._workdir, code)
    if reason and code in (0, -signal.SIGTERM):
      _requeue_if_running()
    if reason:
      raise RuntimeError(reason)

  def checkpoint(self):
    """Stop the run after a checkpoint; return the job that resumes it."""
    from submitit import helpers

    if self._process is not None:
      # Slurm may warn again meanwhile. A second SIGTERM would end the run
      # before it has saved.
      if not self._stopping:
        self._stopping = True
        self._process.terminate()
      self._wait(self._process)
    return helpers.DelayedSubmission(
      Task(self._command, self._workdir, self._cwd)
    )

  def _wait(self, process: subprocess.Popen) -> None:
    # submitit calls `checkpoint` from a signal handler, in the middle of this
    # wait. Popen.wait holds a lock and would deadlock. WNOWAIT leaves the
    # process to be reaped by the other call.
    with contextlib.suppress(ChildProcessError):
      os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _requeue_if_running() -> None:
  """Requeue this job and exit, unless Slurm is ending or requeueing it."""
  import submitit

  job = submitit.JobEnvironment()
  # SLURM_JOB_ID may name a whole array.
  command = ["squeue", "--noheader", "--format=%T", f"--jobs={job.job_id}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.stdout.strip() == "RUNNING":
    # submitit's handler calls `checkpoint`.
    signal.raise_signal(signal.Signals[f"SIG{job.USR_SIG}"])


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
  """Parse --slurm_args; values are Python literals, or else strings."""
  parameters: dict[str, Any] = {}
  for text in texts:
    key, equals, value = text.partition("=")
    if not equals or not key:
      raise errors.UserError(
        f"--slurm_args: {text!r} is not KEY=VALUE, such as timeout_min=600"
      )
    if key in parameters:
      raise errors.UserError(f"--slurm_args: {key} is given twice")
    try:
      parameters[key] = ast.literal_eval(value)
    except (SyntaxError, TypeError, ValueError):
      parameters[key] = value
  return parameters


def create_executor(
  folder: pathlib.Path, parameters: Mapping[str, Any], jobs: int | None
):
  """Return submitit's executor for Slurm, with its files in a folder."""
  try:
    import submitit
  except ImportError as e:
    raise errors.UserError(
      f"--cluster=slurm: needs submitit ({e}); pip install -e '.[slurm]'"
    ) from e
  # By default, some sites requeue no job.
  additional = parameters.get("slurm_additional_parameters", {})
  if not isinstance(additional, dict):
    raise errors.UserError(
      f"--slurm_args: slurm_additional_parameters is {additional!r}, not a"
      " dictionary; give one such as {'nice': 10}"
    )
  parameters = {
    "name": "sweep",
    **parameters,
    "slurm_additional_parameters": {"requeue": True, **additional},
  }
  for key in ("nodes", "tasks_per_node", "slurm_ntasks_per_node"):
    if parameters.get(key, 1) != 1:
      raise errors.UserError(
        f"--slurm_args: {key} is {parameters[key]}, but each run of a sweep is"
        " one process; leave it out"
      )
  if not {"timeout_min", "slurm_time"} & set(parameters):
    raise errors.UserError(
      "--slurm_args: timeout_min (minutes until a job is requeued) is missing;"
      " add timeout_min=600"
    )
  if jobs:
    parameters = {"slurm_array_parallelism": jobs, **parameters}
  try:
    executor = submitit.AutoExecutor(
      folder, "slurm", slurm_max_num_timeout=_MAX_TIMEOUTS
    )
    executor.update_parameters(**parameters)
    return executor
  # submitit raises many types, all with clear messages.
  except Exception as e:
    raise errors.UserError(f"submitit: {' '.join(str(e).split())}") from e


def submit(runs: Sequence[grid.PlannedRun], executor) -> list[str]:
  """Submit at least one run as an array; return the IDs of the jobs."""
  import submitit

  kept = {x: os.environ[x] for x in _USER_VARIABLES if x in os.environ}
  try:
    # The sweep may itself run in a job, whose variables must not be inherited.
    with submitit.helpers.clean_env(), executor.batch():
      os.environ.update(kept)
      jobs = [
        executor.submit(Task(run.command, run.workdir, os.getcwd()))
        for run in runs
      ]
    return [job.job_id for job in jobs]
  except Exception as e:
    raise errors.UserError(f"sbatch: {' '.join(str(e).split())}") from e
