"""Interrupt training after a step, as a kill would."""

from collections.abc import Iterator
import contextlib

import pytest

from rescalevit_jax.training import trainer


@contextlib.contextmanager
def after_step(number: int) -> Iterator[None]:
  """End the run in this context after a step, before its checkpoint."""
  real = trainer.Trainer._step

  def step(self, *batch):
    real(self, *batch)
    if self._progress.step == number:
      raise InterruptedError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer.Trainer, "_step", step)
    with pytest.raises(InterruptedError):
      yield
