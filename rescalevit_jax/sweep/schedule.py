"""Runs the runs of a sweep, several at a time, and says how it goes."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import logging
import math
import re
import signal
import subprocess
import time

from rescalevit_jax.models import flops
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.training import experiment

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclasses.dataclass
class Outcome:
  """What became of a sweep.

  Attributes:
    done: finished runs, those of earlier sweeps included.
    failed: why, by run, as one line.
    left: runs that a signal stopped or kept from starting.
    stopped: whether a signal came; all may be done nonetheless.
    killed: whether a second signal ended the runs before they had saved.
  """

  done: list[grid.PlannedRun] = dataclasses.field(default_factory=list)
  failed: list[tuple[grid.PlannedRun, str]] = dataclasses.field(
    default_factory=list
  )
  left: list[grid.PlannedRun] = dataclasses.field(default_factory=list)
  stopped: bool = False
  killed: bool = False

  @property
  def exit_code(self) -> int:
    """Of a program: 130 after a second signal, 1 if a run failed, else 0."""
    if self.killed:
      return 130
    return 1 if self.failed else 0

  def log(self) -> None:
    """Says it, with a line for each run that failed."""
    _log.info(
      "%d done, %d failed%s",
      len(self.done),
      len(self.failed),
      f", {len(self.left)} left" if self.left else "",
    )
    for run, why in self.failed:
      _log.info("failed: %s: %s", run.workdir, why)
    if self.left or self.failed:
      _log.info("the same command goes on with what is not done")


def stop_signals() -> tuple[signal.Signals, ...]:
  """Returns the signals that stop a sweep: SIGHUP unless nohup ignores it."""
  if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    return signal.SIGTERM, signal.SIGINT
  return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def work(run: grid.PlannedRun) -> float:
  """Returns the work of one step of a run, to compare with others.

  Raises:
    UserError: sizes of the model do not fit together.
  """
  forward = flops.forward_flops(_model(run), run.config.image_size)
  return float(forward * run.config.batch)


def _model(run: grid.PlannedRun):
  config = run.config.copy_and_resolve_references()
  # JAX would start the devices to know what "auto" means.
  config.dtype = "float32"
  return experiment.create_model(config, 1)


@dataclasses.dataclass
class _Running:
  run: grid.PlannedRun
  process: subprocess.Popen
  slot: Mapping[str, str]
  started: float
  first_step: int

  def steps(self) -> int:
    """Steps done since it was started."""
    step = subprocess_run.step_since(self.run.workdir, self.started)
    return max(0, step - self.first_step)


class Schedule:
  """Runs each run as a process of its own; goes on after one that fails.

  Args:
    runs: in the order in which they start.
    done: those that are finished already.
    slots: a place for each run at a time, as `slots.find` returns them.
    stop_times: on the clock of `time.monotonic`, each of which acts like a
      signal: let the runs save and stop, then end them at once.
  """

  def __init__(
    self,
    runs: Sequence[grid.PlannedRun],
    done: Iterable[grid.PlannedRun],
    slots: Sequence[Mapping[str, str]],
    stop_times: Sequence[float] = (),
  ):
    self._stop_times = list(stop_times)
    self._waiting = list(runs)
    self._free = list(slots)
    self._running: list[_Running] = []
    self._outcome = Outcome(done=list(done))
    self._total = len(self._waiting) + len(self._outcome.done)
    self._work = {run.workdir: work(run) for run in runs}
    self._work_done = 0.0  # By processes that have ended, in this sweep.
    self._signals: list[int] = []
    self._stopping = False
    self._start = time.monotonic()

  def run(self) -> Outcome:
    """Runs until all is done, or until a signal.

    SIGTERM, SIGINT and SIGHUP let the runs save and stop; a second one ends
    them at once.
    """
    previous = {
      number: signal.signal(number, self._handle) for number in stop_signals()
    }
    try:
      self._loop()
    finally:
      for running in self._running:
        subprocess_run.kill(running.process)
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
        self._launch(self._waiting.pop(0))
        changed = True
      if changed or time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
        self._log_status()
        last_line = time.monotonic()
      time.sleep(_SECONDS_BETWEEN_LOOKS)
    self._outcome.left += self._waiting

  def _handle(self, number, frame):
    del frame
    self._signals.append(number)

  def _stop(self):
    if not self._stopping:
      self._stopping = self._outcome.stopped = True
      _log.info(
        "%s: the runs save and stop; once more to stop them at once",
        signal.Signals(self._signals[0]).name,
      )
      for running in self._running:
        running.process.terminate()
    elif len(self._signals) > 1 and not self._outcome.killed:
      self._outcome.killed = True
      for running in self._running:
        subprocess_run.kill(running.process)

  def _launch(self, run):
    slot = self._free.pop(0)
    first_step = subprocess_run.saved_step(run.workdir)
    started = time.time()
    _log.info(
      "%s %s", "starting" if not first_step else "going on with", run.workdir
    )
    try:
      process = subprocess_run.start(run.command, run.workdir, slot)
    except OSError as e:
      self._free.append(slot)
      self._outcome.failed.append((run, f"error: {e}"))
      return
    self._running.append(_Running(run, process, slot, started, first_step))

  def _collect(self):
    """Takes note of the runs that have ended; returns whether there are any."""
    ended = [r for r in self._running if r.process.poll() is not None]
    for running in ended:
      run, code = running.run, running.process.returncode
      self._running.remove(running)
      self._free.append(running.slot)
      self._work_done += running.steps() * self._work[run.workdir]
      why = subprocess_run.failure(run.workdir, code)
      if why is None:
        self._outcome.done.append(run)
        _log.info("done: %s", run.workdir)
      elif self._stopping and code <= 0:
        self._outcome.left.append(run)
      else:
        self._outcome.failed.append((run, why))
        _log.info("failed: %s: %s", run.workdir, why)
    return bool(ended)

  def _log_status(self):
    if not self._running and (self._stopping or not self._waiting):
      return  # The outcome says it.
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
    """Seconds that the rest takes at the pace so far; None if none is known."""
    done, left = self._work_done, 0.0
    for run in self._waiting:
      steps = run.config.total_steps - subprocess_run.saved_step(run.workdir)
      left += steps * self._work[run.workdir]
    for running in self._running:
      config, per_step = running.run.config, self._work[running.run.workdir]
      steps = running.steps()
      done += steps * per_step
      left += (config.total_steps - running.first_step - steps) * per_step
    if not done:
      return None
    return left / done * (time.monotonic() - self._start)
