"""The outcome of a sweep: finished runs, and reasons of unfinished ones."""

from collections.abc import Iterable
import dataclasses
import logging
import pathlib
import signal

from rescalevit_jax import errors
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import grid

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Outcome:
  """The outcome of a sweep.

  Attributes:
    done: finished runs, including those of earlier sweeps.
    failed: failed runs, each with the reason as one line.
    left: runs stopped or not started because of a signal or the time limit.
    stopped: True after a signal or the time limit, even if all runs are done.
    out_of_time: True if the time limit was the first to stop the sweep.
    killed: True if a second signal killed the runs.
  """

  done: list[grid.PlannedRun] = dataclasses.field(default_factory=list)
  failed: list[tuple[grid.PlannedRun, str]] = dataclasses.field(
    default_factory=list
  )
  left: list[grid.PlannedRun] = dataclasses.field(default_factory=list)
  stopped: bool = False
  out_of_time: bool = False
  killed: bool = False

  @property
  def exit_code(self) -> int:
    """Exit code: 130 after a second signal, 1 if a run failed, else 0."""
    if self.killed:
      return 130
    return 1 if self.failed else 0

  def log(self) -> None:
    """Log the counts, and one line for each failed run."""
    _log.info(
      "%d done, %d failed%s",
      len(self.done),
      len(self.failed),
      f", {len(self.left)} left" if self.left else "",
    )
    self.log_failed()
    if self.left or self.failed:
      _log.info("the same command resumes unfinished runs")

  def log_failed(self) -> None:
    """Log one line for each failed run."""
    for run, why in self.failed:
      _log.info("failed: %s: %s", run.workdir, why)


def split_by_result(
  runs: Iterable[grid.PlannedRun],
) -> tuple[Outcome, list[grid.PlannedRun]]:
  """Return the outcome of finished, diverged and damaged runs; other runs."""
  outcome, left = Outcome(), []
  for run in runs:
    try:
      result_lib.read(run.workdir)
      folder.read_config(run.workdir)
    except (errors.UserError, OSError) as e:  # Damaged.
      outcome.failed.append((run, f"error: {e}"))
      continue
    try:
      result = result_lib.read_same_run(run.config, run.workdir)
    except errors.UserError as e:
      # A sweep chooses its folders with another flag than a single run.
      message = str(e).replace("another --workdir", "another --runs_dir")
      raise errors.UserError(message) from e
    if result is None:
      left.append(run)
    elif result_lib.has_diverged(result):
      outcome.failed.append((run, f"error: {result['error']}"))
    else:
      outcome.done.append(run)
  return outcome, left


def why_not_finished(
  workdir: pathlib.Path, returncode: int | None
) -> str | None:
  """Return the reason a run is unfinished, as one line; None if finished.

  The return code of its process is None if unknown.
  """
  try:
    result = result_lib.read(workdir)
  except errors.UserError as e:
    return f"error: {e}"
  if result_lib.is_finished(result):
    return None
  line = run_reader.last_log_line(workdir)
  if line.startswith("error: "):
    return line
  if result_lib.has_diverged(result):
    return f"error: {result['error']}"
  if returncode == 0:
    return "error: stopped by a signal; the same command resumes it"
  if returncode is None:
    ended = "ended early"
  elif returncode < 0:
    ended = f"killed by {_signal_name(-returncode)}"
  else:
    ended = f"ended with exit code {returncode}"
  return f"error: {ended}; last line of its log: {line}"


def _signal_name(number):
  try:
    return signal.Signals(number).name
  except ValueError:  # A real-time signal.
    return f"signal {number}"
