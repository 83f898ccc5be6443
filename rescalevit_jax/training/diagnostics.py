"""Diagnostics of a run: when they are measured and how they are logged.

They are measured around the first step of a run and every
`diagnostics_every`-th step, by separate programs: the training step and its
results do not change. The line of step n in metrics.jsonl has these names,
prefixed with `diagnostics/`:

  embedding/…, block_00/…, head/…    see `measurements`: gradient and update of
                                     step n, residual stream before it
  clipped_share                      fraction of the steps since the previous
                                     line whose gradient was clipped
  effective_lr                       mean of lr * min(1, clip / norm) over them
  sharpness, sharpness_residual      before step n, for step 1 and every tenth
                                     measurement; see `sharpness`

Stream and sharpness are measured on the probe images: the first images of the
evaluation split, prepared as in evaluation.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.augment import preprocess
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import jacobian as jacobian_lib
from rescalevit_jax.training import measurements
from rescalevit_jax.training import sharpness as sharpness_lib
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib

PREFIX = "diagnostics/"
PROBE_IMAGES = 64
SHARPNESS_EVERY = 10  # Measurements.


class CompiledDiagnostics:
  """The compiled measurements of an experiment."""

  def __init__(self, experiment: experiment_lib.Experiment):
    config, model = experiment.config, experiment.model
    replicated = sharding.replicated(experiment.mesh)
    shardings = experiment.shardings()
    options = experiment.gradient_options()

    def inputs(state, probe):
      gather = options.get("gather", lambda params: params)
      return (
        gather(state.params),
        state.batch_stats,
        preprocess.prepare(probe, config.image_size),
      )

    def before_step(state, images, labels, seed, probe):
      _, grads, _, _ = train_step_lib.gradient(
        state, images, labels, seed, **options
      )
      params, batch_stats, x = inputs(state, probe)
      variables = {"params": params, "batch_stats": batch_stats}
      found = (
        measurements.gradient_norms(grads)
        | measurements.scalars(state.params)
        | measurements.forward(model, variables, x)
      )
      # The step donates the state.
      return found, jax.tree.map(jnp.copy, state.params)

    def sharpness(state, seed, probe, labels):
      return sharpness_lib.sharpness(
        *inputs(state, probe), labels, seed, model=model
      )

    def jacobian(state, seed, probe):
      return jacobian_lib.norms(*inputs(state, probe), seed, model=model)

    # `compile` replaces the first three by compiled programs.
    self._before_step: Any = jax.jit(
      before_step, out_shardings=(replicated, shardings.params)
    )
    self.after_step: Any = jax.jit(
      measurements.after_step, out_shardings=replicated
    )
    self._sharpness: Any = jax.jit(sharpness, out_shardings=replicated)
    self._jacobian = jax.jit(jacobian, out_shardings=replicated)
    images = -(-PROBE_IMAGES // experiment.mesh.size) * experiment.mesh.size
    # A small split is repeated.
    probe = np.arange(images, dtype=np.int32) % len(experiment.test_loader)
    with experiment.test_loader.batches(lambda _: probe, range(1)) as batches:
      self._probe, self._labels = next(batches)
    self._seed = np.uint32(config.seed)

  def compile(
    self, state: train_state.TrainState, images: jax.Array, labels: jax.Array
  ) -> None:
    """Compile all measurements for the arguments of a step."""
    seed, probe = self._seed, self._probe
    self._before_step = self._before_step.lower(
      state, images, labels, seed, probe
    ).compile()
    self.after_step = self.after_step.lower(
      state.params, state.params
    ).compile()
    self._sharpness = self._sharpness.lower(
      state, seed, probe, self._labels
    ).compile()

  def before_step(
    self, state: train_state.TrainState, images: jax.Array, labels: jax.Array
  ) -> tuple[dict[str, jax.Array], Any]:
    """Measure the gradient of the next step and the residual stream before it.

    The state's weights, not their averages, are measured. The gradient of the
    step is computed a second time.

    Returns:
      The results of `measurements.gradient_norms`, `scalars` and `forward`, and
      a copy of the parameters.
    """
    return self._before_step(state, images, labels, self._seed, self._probe)

  def jacobian(self, state: train_state.TrainState) -> dict[str, jax.Array]:
    """Return `jacobian.norms` on the probe images."""
    return self._jacobian(state, self._seed, self._probe)

  def sharpness(self, state: train_state.TrainState) -> dict[str, jax.Array]:
    """Return `sharpness.sharpness` on the probe images."""
    return self._sharpness(state, self._seed, self._probe, self._labels)


class Diagnostics:
  """Measures the diagnostics of a run, if its config enables them.

  The run's progress stores the sums since the last line.
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
      self._restart_sums()  # They may be enabled later.
      return
    self._num_layers = experiment.model.config.num_layers
    self._measure = CompiledDiagnostics(experiment)
    # All at once: one at a time would interrupt the device between steps.
    counts = jnp.arange(config.total_steps)
    self._learning_rates = np.asarray(
      jax.vmap(experiment.lr_schedule)(counts), np.float64
    )

  def train_step(
    self,
    step: int,
    state: train_state.TrainState,
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Dispatch `train_step.train_step` and the measurements around it.

    Returns:
      The state and the metrics for `finish_step`, with `diagnostics` if this
      step is measured.
    """
    every = self._config.diagnostics_every
    arguments = (images, labels, np.uint32(self._config.seed))
    train_step = self._experiment.train_step(step, self._progress.skipped_steps)
    if every and not self._compiled:
      self._measure.compile(state, images, labels)
      self._compiled = True
    if not every or (step % every and step != 1):
      return train_step(state, *arguments)
    found, before = self._measure.before_step(state, images, labels)
    if step == 1 or step // every % SHARPNESS_EVERY == 0:
      found |= self._measure.sharpness(state)
    state, metrics = train_step(state, *arguments)
    found |= self._measure.after_step(before, state.params)
    return state, {**metrics, "diagnostics": found}

  def finish_step(
    self, step: int, metrics: dict[str, Any]
  ) -> dict[str, float] | None:
    """Add a finished step to the sums; return the line to write, or None.

    Call it for each step, in order, with the metrics as numpy arrays.
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
    sums.effective_lr += float(self._learning_rates[count]) * factor
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
  """Return the factor by which clipping scales a gradient.

  `clip` is `grad_norm_clip`. The factor is a lower bound with `agc`, which
  comes first and may reduce the norm. It is 0 for a gradient that is not
  finite, whose step is skipped.
  """
  if not math.isfinite(grad_norm):
    return 0.0
  return min(1.0, clip / grad_norm) if clip and grad_norm else 1.0
