"""Profile of host and devices during some training steps."""

import logging
import pathlib
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Profile:
  """A trace of `steps` steps, for TensorBoard or Perfetto; 0: no trace.

  Own code, since `clu.periodic_actions.Profile` imports TensorFlow.
  """

  def __init__(self, folder: pathlib.Path, first_step: int, steps: int):
    if steps:
      folder.mkdir(parents=True, exist_ok=True)  # Fail early.
    self._folder = folder
    self._steps = range(first_step, first_step + steps)
    self._running = False

  def before(self, step: int, state: Any) -> None:
    """Start or end the trace before a step; wait for the arrays of `state`."""
    if step in self._steps and not self._running:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True
    elif step not in self._steps:
      self.end(state)

  def end(self, state: Any) -> None:
    """End the trace, if one is running."""
    if not self._running:
      return
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    self._running = False
    self._steps = range(0)
    _log.info("wrote profile to %s", self._folder)
