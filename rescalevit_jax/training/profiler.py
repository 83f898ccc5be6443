"""Records what host and devices do in some training steps."""

import logging
import pathlib
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Profile:
  """A trace of some steps, for TensorBoard or Perfetto.

  Args:
    folder: where it is written.
    first_step: the first one to record; earlier ones compile and warm up.
    steps: how many; 0: none.
  """

  def __init__(self, folder: pathlib.Path, first_step: int, steps: int):
    if steps:
      folder.mkdir(parents=True, exist_ok=True)  # It fails now or never.
    self._folder = folder
    self._steps = range(first_step, first_step + steps)
    self._running = False

  def before(self, step: int, state: Any) -> None:
    """Starts or ends the recording if `step` is the one for that.

    Args:
      step: that is started next.
      state: what the devices work on.
    """
    if step in self._steps and not self._running:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True
    elif step not in self._steps:
      self.end(state)

  def end(self, state: Any) -> None:
    """Ends the recording if there is one."""
    if not self._running:
      return
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    self._running = False
    self._steps = range(0)
    _log.info("profile: %s", self._folder)
