"""Schedule the runs of a sweep on this machine and log their progress."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import logging
import math
import operator
import os
import re
import signal
import subprocess
import time

from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import outcome as outcome_lib
from rescalevit_jax.sweep import subprocess_run

_log = logging.getLogger(__name__)

_STATUS_SECONDS = 10.0
_POLL_SECONDS = 0.2


@dataclasses.dataclass
class _Running:
  run: grid.PlannedRun
  process: subprocess.Popen
  slot: Mapping[str, str]
  started: float
  first_step: int

  def steps(self) -> int:
    """Return the number of steps since the start of the process."""
    step = subprocess_run.step_since(self.run.workdir, self.started)
    return max(0, step - self.first_step)


class LocalScheduler:
  """Executes each run as its own process; a failed run stops no other.

  Args:
    runs: the runs to execute, in order.
    done: runs that are already finished.
    slots: environment variables for each concurrent run; see `device_slots`.
    stop_times: times of `time.monotonic`; each acts like a signal. After the
      first the runs save and stop, after the second they are killed.
    choose: function from the waiting runs to the next one, or to None if none
      should start any more; None for the first run.
  """

  def __init__(
    self,
    runs: Sequence[grid.PlannedRun],
    done: Iterable[grid.PlannedRun],
    slots: Sequence[Mapping[str, str]],
    stop_times: Sequence[float] = (),
    choose: Callable[[Sequence[grid.PlannedRun]], grid.PlannedRun | None]
    | None = None,
  ):
    self._stop_times = list(stop_times)
    self._choose = choose or operator.itemgetter(0)
    self._waiting = list(runs)
    self._free = list(slots)
    self._running: list[_Running] = []
    self._outcome = outcome_lib.Outcome(done=list(done))
    self._total = len(self._waiting) + len(self._outcome.done)
    self._flops_done = 0.0  # By processes of this sweep that have ended.
    self._signals: list[int] = []
    self._stopping = False
    self._start = time.monotonic()

  def run(self) -> outcome_lib.Outcome:
    """Run until all runs have ended, or until a signal.

    After SIGTERM, SIGINT or SIGHUP the runs save a checkpoint and stop. A
    second signal kills them.
    """
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # As under nohup.
      numbers.remove(signal.SIGHUP)

    def handle(number, frame):
      del frame
      self._signals.append(number)

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
      self._loop()
    finally:
      self._kill()
      for number, handler in previous.items():
        signal.signal(number, handler)
    return self._outcome

  def _loop(self):
    last_line = -math.inf
    while self._running or (self._waiting and not self._stopping):
      changed = self._collect()
      while self._stop_times and time.monotonic() > self._stop_times[0]:
        self._signals.append(signal.SIGALRM)
        self._stop_times.pop(0)
      if self._signals:
        self._stop()
      while self._waiting and self._free and not self._stopping:
        self._launch_next()
        changed = True
      if changed or time.monotonic() - last_line > _STATUS_SECONDS:
        self._log_status()
        last_line = time.monotonic()
      time.sleep(_POLL_SECONDS)
    self._outcome.left += self._waiting

  def _stop(self):
    if not self._stopping:
      self._stopping = self._outcome.stopped = True
      self._outcome.out_of_time = self._signals[0] == signal.SIGALRM
      _log.info(
        "%s: the runs save and stop; a second signal kills them",
        "time limit"
        if self._outcome.out_of_time
        else signal.Signals(self._signals[0]).name,
      )
      for running in self._running:
        running.process.terminate()
    elif len(self._signals) > 1 and not self._outcome.killed:
      self._outcome.killed = True
      self._kill()

  def _kill(self):
    """Kill the runs and all their child processes."""
    for running in self._running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)

  def _launch_next(self):
    if (run := self._choose(self._waiting)) is None:
      _log.info("too little time is left to start a run")
      self._outcome.stopped = self._outcome.out_of_time = True
      self._outcome.left += self._waiting
      self._waiting.clear()
      return
    self._waiting.remove(run)
    slot = self._free.pop(0)
    started = time.time()
    try:
      first_step = subprocess_run.saved_step(run.workdir)
      _log.info("%s %s", "resuming" if first_step else "starting", run.workdir)
      process = subprocess_run.start(run.command, run.workdir, slot)
    except OSError as e:
      self._free.append(slot)
      self._outcome.failed.append((run, f"error: {e}"))
      return
    self._running.append(_Running(run, process, slot, started, first_step))

  def _collect(self):
    """Record the runs that have ended; return True if there are any."""
    ended = [r for r in self._running if r.process.poll() is not None]
    for running in ended:
      run, code = running.run, running.process.returncode
      self._running.remove(running)
      self._free.append(running.slot)
      self._flops_done += running.steps() * run.step_flops
      reason = outcome_lib.why_not_finished(run.workdir, code)
      if reason is None:
        self._outcome.done.append(run)
        _log.info("done: %s", run.workdir)
      elif self._stopping and code <= 0:
        self._outcome.left.append(run)
      else:
        self._outcome.failed.append((run, reason))
        _log.info("failed: %s: %s", run.workdir, reason)
    return bool(ended)

  def _log_status(self):
    if not self._running and (self._stopping or not self._waiting):
      return  # Only the outcome is left to log.
    eta = self._eta()
    _log.info(
      "%d of %d done, %d failed, %d running, %d left%s",
      len(self._outcome.done),
      self._total,
      len(self._outcome.failed),
      len(self._running),
      len(self._waiting) + len(self._outcome.left),
      f", ETA {terminal.duration(eta)}" if eta is not None else "",
    )
    for running in self._running:
      line = run_reader.last_log_line(running.run.workdir)
      line = re.sub(r"^\d\d:\d\d:\d\d ", "", line)
      if line.startswith(run_reader.LOG_HEADER):
        line = "starting"
      _log.info("  %s: %s", running.run.workdir.name, line[:160])

  def _eta(self):
    """Return the seconds left at the speed so far; None before any step."""
    done, left = self._flops_done, 0.0
    for run in self._waiting:
      steps = run.config.total_steps - subprocess_run.saved_step(run.workdir)
      left += steps * run.step_flops
    for running in self._running:
      run, steps = running.run, running.steps()
      done += steps * run.step_flops
      steps_left = run.config.total_steps - running.first_step - steps
      left += steps_left * run.step_flops
    if not done:
      return None
    return left / done * (time.monotonic() - self._start)
