"""Diagnostics of a run: when they are taken, and what is written of them.

They are taken around the first step of a run and around every
`diagnostics_every`-th one, by programs of their own: the training step is the
same with them or without, and so are the run's numbers. The line of step n in
metrics.jsonl has, each with `diagnostics/` before its name,

  embedding/…, block_00/…, head/…    see `measurements`: the gradient of step n,
                                     the stream before it, and its update
  clipped_share                      share of the steps since the line before
                                     whose gradient was clipped
  effective_lr                       mean of these steps' lr * min(1, clip/norm)
  sharpness, sharpness_residual      at every tenth taking and at step 1: see
                                     `sharpness`; before step n

The stream and the sharpness are those of the probe: the first images of the
evaluation split, prepared as in evaluation, always the same.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.augment import preprocess
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import measurements
from rescalevit_jax.training import sharpness as sharpness_lib
from rescalevit_jax.training import train_state

PREFIX = "diagnostics/"
PROBE_IMAGES = 64
SHARPNESS_EVERY = 10  # Takings.


class CompiledDiagnostics:
  """The compiled measurements of an experiment, on its devices.

  Args:
    experiment: data, model and devices.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    config, model = experiment.config, experiment.model
    everywhere, places = (
      sharding.replicated(experiment.mesh),
      experiment.shardings(),
    )
    options = experiment.gradient_options()

    def before_step(state, images, labels, seed, probe):
      found = measurements.before_step(
        state, images, labels, seed, probe, gradient_options=options
      )
      # The state is given away to the step.
      return found, jax.tree.map(jnp.copy, state.params)

    def sharpness(state, seed, probe, labels):
      return sharpness_lib.sharpness(
        options.get("gather", lambda params: params)(state.params),
        state.batch_stats,
        preprocess.prepare(probe, config.image_size),
        labels,
        seed,
        model=model,
      )

    self._before_step = jax.jit(
      before_step, out_shardings=(everywhere, places.params)
    )
    self._after_step = jax.jit(
      measurements.after_step, out_shardings=everywhere
    )
    self._sharpness = jax.jit(sharpness, out_shardings=everywhere)
    with experiment.test_loader.batches(
      functools.partial(_probe_places, experiment), range(1)
    ) as batches:
      self._probe, self._labels = next(batches)
    self._seed = np.uint32(config.seed)

  def compile(
    self, state: train_state.TrainState, images: jax.Array, labels: jax.Array
  ) -> None:
    """Compiles all of them now; the arguments are those of a step."""
    arguments = (state, images, labels, self._seed, self._probe)
    self._before_step = self._before_step.lower(*arguments).compile()
    params = state.params
    self._after_step = self._after_step.lower(params, params).compile()
    arguments = (state, self._seed, self._probe, self._labels)
    self._sharpness = self._sharpness.lower(*arguments).compile()

  def before_step(
    self, state: train_state.TrainState, images: jax.Array, labels: jax.Array
  ) -> tuple[dict[str, jax.Array], Any]:
    """Returns `measurements.before_step` and a copy of the parameters."""
    return self._before_step(state, images, labels, self._seed, self._probe)

  def after_step(self, before: Any, after: Any) -> dict[str, jax.Array]:
    """Returns `measurements.after_step`."""
    return self._after_step(before, after)

  def sharpness(self, state: train_state.TrainState) -> dict[str, jax.Array]:
    """Returns `sharpness.sharpness` on the probe."""
    return self._sharpness(state, self._seed, self._probe, self._labels)


def _probe_places(experiment, number):
  """The probe's places in the evaluation split; a small one is repeated."""
  del number
  devices = experiment.mesh.size
  images = -(-PROBE_IMAGES // devices) * devices
  return np.arange(images, dtype=np.int32) % len(experiment.test_loader)


class Diagnostics:
  """Takes a run's diagnostics, if its config says so.

  Args:
    experiment: data, model and optimizer.
    progress: of the run; keeps what is summed over the steps between two lines.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    progress: checkpoint.Progress,
  ):
    self._config = config = experiment.config
    self._progress = progress
    self._experiment = experiment
    self._compiled = False
    if not config.diagnostics_every:
      self._restart_sums()  # Should they be switched on later.
      return
    self._num_layers = experiment.model.num_layers
    self._programs = CompiledDiagnostics(experiment)
    # All at once, not one by one between steps that the device works on.
    counts = jnp.arange(config.total_steps)
    self._rates = np.asarray(
      jax.vmap(experiment.lr_schedule)(counts), np.float64
    )

  def train_step(
    self,
    step: int,
    state: train_state.TrainState,
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Starts `step.train_step`, and around it what is to be measured.

    Waits for nothing but, at the first call, the compiler.

    Args:
      step: the number of this step, from 1.
      state: before it; given away.
      images: see `step.train_step`.
      labels: likewise.

    Returns:
      The state and the metrics, to be given to `finish_step` when read; among
      them `diagnostics` if there are any of this step.
    """
    every = self._config.diagnostics_every
    arguments = (images, labels, np.uint32(self._config.seed))
    train_step = self._experiment.train_step(step, self._progress.skipped_steps)
    if every and not self._compiled:
      self._programs.compile(state, images, labels)
      self._compiled = True
    if not every or (step % every and step != 1):
      return train_step(state, *arguments)
    found, before = self._programs.before_step(state, images, labels)
    if step == 1 or step // every % SHARPNESS_EVERY == 0:
      found |= self._programs.sharpness(state)
    state, metrics = train_step(state, *arguments)
    found |= self._programs.after_step(before, state.params)
    return state, {**metrics, "diagnostics": found}

  def finish_step(
    self, step: int, metrics: dict[str, Any]
  ) -> dict[str, float] | None:
    """Takes a finished step into account; to be called for each, in order.

    Args:
      step: its number.
      metrics: what `train_step` returned, as numpy arrays.

    Returns:
      The line to write, or None.
    """
    if not self._config.diagnostics_every:
      return None
    factor = clip_factor(
      float(metrics["grad_norm"]), self._config.grad_norm_clip
    )
    sums = self._progress
    sums.summed_steps += 1
    sums.clipped_steps += 0 < factor < 1
    count = max(0, step - 1 - sums.skipped_steps)
    sums.effective_lr += float(self._rates[count]) * factor
    if "diagnostics" not in metrics:
      return None
    line = {
      "clipped_share": sums.clipped_steps / sums.summed_steps,
      "effective_lr": sums.effective_lr / sums.summed_steps,
      **measurements.by_name(metrics["diagnostics"], self._num_layers),
    }
    self._restart_sums()
    return {f"{PREFIX}{name}": value for name, value in line.items()}

  def _restart_sums(self):
    sums = self._progress
    sums.summed_steps, sums.clipped_steps, sums.effective_lr = 0, 0, 0.0


def clip_factor(grad_norm: float, clip: float) -> float:
  """Returns what the clipping by global norm multiplies a gradient by.

  With `agc`, which comes before it, the norm it sees may be smaller: then this
  is a lower bound.

  Args:
    grad_norm: before any clipping.
    clip: `grad_norm_clip`; 0: no clipping.

  Returns:
    The factor; 0 for a gradient that is not finite, whose step is skipped.
  """
  if not math.isfinite(grad_norm):
    return 0.0
  return min(1.0, clip / grad_norm) if clip and grad_norm else 1.0
