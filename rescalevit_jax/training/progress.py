"""Progress of a run: throughput, ETA, warnings about long runs."""

import logging
import os
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import flops
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)

# Speed of a training step relative to a large matrix product.
_EFFICIENCY = 0.4
_LONG_RUN_SECONDS = 3600.0
_SLOW_DEVICE = 1e10  # FLOP/s, less than any device in use.


class Timer:
  """Measures training time without compilation and evaluation."""

  def __init__(self, total_steps: int, batch: int, step: int):
    self._total_steps, self._batch = total_steps, batch
    self._step = self._first_step = step
    self._start = self._mark = self.last_line = time.monotonic()

  def first_step_done(self, step: int) -> None:
    """Start measuring after the first step, which includes compilation."""
    self._step = self._first_step = step
    self._start = self._mark = time.monotonic()

  def restart(self) -> None:
    """Ignore the time since the last `lap`."""
    self._mark = time.monotonic()

  def lap(self, step: int) -> tuple[int, float]:
    """Return steps and seconds since the last lap or restart."""
    now = time.monotonic()
    steps, seconds = step - self._step, now - self._mark
    self._step, self._mark = step, now
    return steps, seconds

  def log(self, loss: float, lr: float, steps: int, seconds: float) -> None:
    """Log a progress line; `steps` and `seconds` are of the last lap."""
    self.last_line = now = time.monotonic()
    speed = eta = ""
    if steps:
      rate = images_per_second(steps, seconds, self._batch)
      speed = f"  {rate:.{0 if rate >= 10 else 2}f} images/s"
    if self._step > self._first_step:
      pace = (now - self._start) / (self._step - self._first_step)
      left = pace * (self._total_steps - self._step)
      eta = f"  ETA {terminal.duration(left)}"
    _log.info(
      "step %d/%d  loss %.4f  lr %.5f%s%s",
      self._step,
      self._total_steps,
      loss,
      lr,
      speed,
      eta,
    )


def images_per_second(steps: int, seconds: float, batch: int) -> float:
  """Return the throughput, 0 if nothing was measured."""
  return steps * batch / seconds if seconds > 0 else 0.0


def warn_of_idle_gpu() -> None:
  """Warn if the machine has an NVIDIA GPU that JAX does not see."""
  if jax.default_backend() == "cpu" and os.path.exists("/dev/nvidiactl"):
    _log.warning(
      "JAX does not see the NVIDIA GPU of this machine; install"
      " `pip install -e '.[cuda13]'` (or cuda12)"
    )


def warn_of_unfinished_norms(schedule: Any, passes: int, skipped: int) -> None:
  """Warn if norms have not faded after `passes` because of skipped steps."""
  if schedule is not None and skipped and schedule.end > passes:
    _log.warning(
      "fade.end: norms have not faded, as float16 skipped %d steps; lower"
      " fade.end or set dtype=float32 in a new --workdir",
      skipped,
    )


def warn_of_long_run(
  model: nn.Module,
  *,
  batch: int,
  steps: int,
  gradients: int,
  eval_images: int,
  evaluations: int,
) -> None:
  """Estimate the run time from the speed of a matrix product; warn if long."""
  forward = flops.forward_flops(model.config)
  images = 3 * gradients * batch  # A backward pass costs two forward ones.
  total = forward * (images * steps + eval_images * evaluations)
  share = _EFFICIENCY * jax.device_count()
  if total / (share * _SLOW_DEVICE) < _LONG_RUN_SECONDS:
    return  # Measuring takes 0.1 s, before the first step.
  rate = share * _matmul_flops_per_second(model.config.dtype)
  if total / rate > _LONG_RUN_SECONDS:
    _log.warning(
      "estimated run time: %s on %d x %s (%.2g s for each of %d steps of %d"
      " images, %s for each of %d evaluations)",
      terminal.duration(total / rate),
      jax.device_count(),
      jax.devices()[0].device_kind,
      forward * images / rate,
      steps,
      batch,
      terminal.duration(forward * eval_images / rate),
      evaluations,
    )


def _matmul_flops_per_second(dtype):
  size = 1024 if jax.default_backend() == "cpu" else 4096
  x = jnp.ones((size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  times = []
  for _ in range(3):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)
