"""SIGTERM, SIGINT and SIGHUP make a run save a checkpoint and stop."""

import logging
import signal
import threading

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


class StopSignal:
  """A request to stop, by signal.

  A context manager; `training/train.py` enters it before it restores the
  checkpoint. The first signal sets `requested`; the second one has its default
  effect. Several processes of one run stop after the same step: JAX handles
  SIGTERM and synchronizes them.
  """

  # SIGHUP: the terminal was closed.
  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

  def __init__(self):
    self.requested = False
    self._previous = {}

  def __enter__(self) -> "StopSignal":
    # Only the main thread can set signal handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and jax.process_count() == 1:
      self._previous = {
        s: signal.signal(s, self._handle)
        for s in self.SIGNALS
        if signal.getsignal(s) != signal.SIG_IGN  # As under nohup.
      }
    return self

  def __exit__(self, *exc_info):
    self._restore()

  def poll(self, step: int) -> None:
    """Update `requested` from the other processes; call it once each step."""
    if jax.process_count() > 1:
      self.requested = multihost_utils.reached_preemption_sync_point(step)

  def _handle(self, number, frame):
    del frame
    self.requested = True
    self._restore()
    _log.info(
      "%s: saving a checkpoint; a second signal stops at once",
      signal.Signals(number).name,
    )

  def _restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
