"""The runs of a sweep as jobs of submitit: a Slurm array, or local processes.

Slurm says beforehand that it will end a job, for its time is over or others
come first. submitit then calls the job's `checkpoint`, which lets the run save
and stop, and puts the job into the queue again, where the run goes on.
"""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import logging
import os
import pathlib
import subprocess
import time
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import subprocess_run

_log = logging.getLogger(__name__)

# A job that times out has come nearer to its end, so that it may as often as
# it needs to; submitit's default is 3.
_TIMEOUTS = 1000
_LOCAL_MINUTES = 7 * 24 * 60
_SECONDS_BETWEEN_LOOKS = 0.5


class Task:
  """A run as submitit's job: pickled, called on some machine.

  Args:
    command: the program with its arguments.
    workdir: the run's folder, relative to `folder` or absolute.
    folder: where to start the program.
  """

  def __init__(
    self, command: Sequence[str], workdir: pathlib.Path, folder: str
  ):
    self._command = list(command)
    self._workdir = workdir
    self._folder = folder
    self._process: subprocess.Popen | None = None

  def __call__(self) -> None:
    """Runs until the end; raises RuntimeError if the run does not finish."""
    os.chdir(self._folder)
    self._process = subprocess_run.start(self._command, self._workdir, {})
    self._wait()
    code = self._process.wait()
    if why := subprocess_run.failure(self._workdir, code):
      raise RuntimeError(why)

  def checkpoint(self):
    """Lets the run save and stop; returns the job that goes on with it."""
    from submitit import helpers

    if self._process is not None:
      self._process.terminate()
      self._wait()
    return helpers.DelayedSubmission(
      Task(self._command, self._workdir, self._folder)
    )

  def _wait(self):
    # submitit calls `checkpoint` from a signal handler, that is, in the middle
    # of this very wait: Popen.wait has a lock that it would hang on. This one
    # leaves the process to be waited for by others.
    with contextlib.suppress(ChildProcessError):
      os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
  """Parses KEY=VALUE of --slurm_args; values are Python's, or else text."""
  parameters = {}
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
    except (SyntaxError, ValueError):
      parameters[key] = value
  return parameters


def executor(
  cluster: str,
  folder: pathlib.Path,
  parameters: Mapping[str, Any],
  jobs: int | None,
):
  """Returns submitit's executor.

  Args:
    cluster: 'slurm' or 'local'.
    folder: where submitit writes its files.
    parameters: of AutoExecutor.update_parameters.
    jobs: how many runs at a time, if that is limited.

  Raises:
    UserError: submitit is not installed, there is no such cluster here, or a
      parameter does not do.
  """
  try:
    import submitit
  except ImportError as e:
    raise errors.UserError(
      f"--cluster={cluster} needs submitit ({e}): pip install -e '.[slurm]'"
    ) from e
  parameters = {"name": "sweep", **parameters}
  for key in ("nodes", "tasks_per_node", "slurm_ntasks_per_node"):
    if parameters.get(key, 1) != 1:
      raise errors.UserError(
        f"--slurm_args: {key} must be 1: each run of a sweep is one process"
      )
  if cluster == "local":
    parameters = {"timeout_min": _LOCAL_MINUTES, **parameters}
  elif not {"timeout_min", "slurm_time"} & set(parameters):
    raise errors.UserError(
      "--slurm_args: timeout_min is missing, the longest that a job may run"
      " before it is put into the queue again; such as timeout_min=600"
    )
  elif jobs:
    parameters = {"slurm_array_parallelism": jobs, **parameters}
  try:
    result = submitit.AutoExecutor(
      folder, cluster, **{f"{cluster}_max_num_timeout": _TIMEOUTS}
    )
    result.update_parameters(**parameters)
    return result
  # Its own exceptions are of many kinds; their messages are good.
  except Exception as e:
    raise errors.UserError(f"submitit: {' '.join(str(e).split())}") from e


def submit_to_slurm(runs: Sequence[grid.PlannedRun], slurm) -> list[str]:
  """Submits the runs as one array.

  Args:
    runs: at least one.
    slurm: what `executor` returns.

  Returns:
    The ids of the jobs, in the order of the runs.

  Raises:
    UserError: Slurm does not take it.
  """
  import submitit

  try:
    # What it knows of a job that this sweep may itself be part of.
    with submitit.helpers.clean_env(), slurm.batch():
      jobs = [slurm.submit(_task(run)) for run in runs]
    return [job.job_id for job in jobs]
  except Exception as e:
    raise errors.UserError(f"sbatch: {' '.join(str(e).split())}") from e


def run_locally(
  runs: Sequence[grid.PlannedRun],
  local,
  jobs: int,
) -> list[tuple[grid.PlannedRun, str]]:
  """Runs them through submitit on this machine, until all have ended.

  Args:
    runs: in the order in which they start.
    local: what `executor` returns.
    jobs: how many at a time.

  Returns:
    Runs that failed, with the reason as a line.
  """
  waiting, running, failed = list(runs), [], []
  try:
    while waiting or running:
      while waiting and len(running) < jobs:
        run = waiting.pop(0)
        job = local.submit(_task(run))
        running.append((run, job))
        _log.info("%s: job %s", run.workdir, job.job_id)
      for run, job in [x for x in running if x[1].done()]:
        running.remove((run, job))
        if why := subprocess_run.failure(run.workdir, None):
          failed.append((run, why))
          _log.info("failed: %s: %s", run.workdir, why)
        else:
          _log.info("done: %s", run.workdir)
      time.sleep(_SECONDS_BETWEEN_LOOKS)
  finally:
    for _, job in running:
      job.cancel()
    for _, job in running:
      while not job.done():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
  return failed


def _task(run):
  return Task(run.command, run.workdir, os.getcwd())
