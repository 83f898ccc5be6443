"""The training loop."""

from collections.abc import Callable, Mapping
import logging
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import loader
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import preemption
from rescalevit_jax.training import profiler
from rescalevit_jax.training import progress as progress_lib
from rescalevit_jax.training import scores
from rescalevit_jax.training import train_state

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_WARM_UP_STEPS = 3  # Before a profile.

# (step, experiment, variables) -> images by name, uint8 [H, W, 3].
DrawAttention = Callable[
  [int, experiment_lib.Experiment, Mapping[str, Any]], Mapping[str, np.ndarray]
]


class DivergedError(errors.UserError):
  """The loss or its gradient is not finite."""


class Trainer:
  """The training loop: steps, evaluations, checkpoints and metrics.

  It donates the initial state and updates the run's progress in place.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    state: train_state.TrainState,
    progress: checkpoint.Progress,
    checkpoints: checkpoint.Checkpoints,
    writer: metric_writers.MetricWriter,
    folder: pathlib.Path,
    draw_attention: DrawAttention | None = None,
  ):
    config = experiment.config
    self._config = config
    self._experiment = experiment
    self._draw_attention = draw_attention
    self._state = state
    self._progress = progress
    self._checkpoints = checkpoints
    self._writer = writer

    self._train = experiment.train_loader
    self._evaluator = evaluate.create_evaluator(experiment)
    self._diagnostics = diagnostics.Diagnostics(experiment, progress)
    steps = config.total_steps - progress.step
    progress_lib.warn_of_long_run(
      experiment.model,
      batch=config.batch,
      steps=steps,
      gradients=2 if config.sam_rho else 1,
      eval_images=len(experiment.dataset.test),
      evaluations=-(-steps // config.eval_every),
    )
    self._metrics = None  # Of the step that the device computes.
    self._first_step = progress.step + 1
    # Once all norms have settled, a second program is compiled.
    settled_from = (experiment.settled_from or 1) + progress.skipped_steps
    self._recompiled = max(settled_from, self._first_step)
    self._profile = profiler.Profile(
      folder / folder_lib.PROFILE,
      self._recompiled + _WARM_UP_STEPS,
      config.profile_steps,
    )
    self._seconds_before = progress.seconds
    self._started = time.monotonic()
    self._timer = progress_lib.Timer(
      config.total_steps, config.batch, progress.step
    )

  def run(self, stop: preemption.StopSignal) -> bool:
    """Train until the last step or `stop`; return whether it is the last."""
    config, progress = self._config, self._progress
    if progress.step < config.total_steps:
      _log.info("compiling the training step")
    steps = range(progress.step + 1, config.total_steps + 1)
    with self._train.batches(self._experiment.train_indices, steps) as batches:
      while True:
        stop.poll(progress.step)
        if self._evaluation_is_due():
          self._evaluate(stop)
        at_end = progress.step == config.total_steps
        due = progress.step > 0 and progress.step % config.checkpoint_every == 0
        if stop.requested or at_end or due:
          self._save()
        if stop.requested or at_end:
          break
        self._step(*next(batches))
    self._profile.end(self._state)
    self._checkpoints.wait()
    if at_end:
      progress_lib.warn_of_unfinished_norms(
        self._experiment.model.config.norm_schedule,
        self._passes(),
        progress.skipped_steps,
      )
    return progress.last_step == config.total_steps

  def _step(self, images, labels):
    """Dispatch a step, then log the metrics of the previous one."""
    progress = self._progress
    step = progress.step + 1
    if self._first_step < step == self._recompiled:
      _log.info("norms are calibrated; compiling the step without calibration")
      self._finish_step()
      self._lap(progress.step)
    self._profile.before(step, self._state)
    self._state, metrics = self._diagnostics.train_step(
      step, self._state, images, labels
    )
    self._finish_step()
    progress.step, self._metrics = step, metrics
    if step in (self._first_step, self._recompiled):
      jax.block_until_ready(metrics)
      if step == self._first_step:
        seconds = time.monotonic() - self._started
        _log.info("first step done after %.1f s", seconds)
        self._writer.open()
      self._timer.first_step_done(step)

  def _finish_step(self):
    """Wait for the metrics of the dispatched step and log them."""
    if self._metrics is None:
      return
    step, found = self._progress.step, jax.device_get(self._metrics)
    self._metrics = None
    # The optimizer does not count skipped steps.
    count = step - 1 - self._progress.skipped_steps
    metrics = {k: v.item() for k, v in found.items() if k != "diagnostics"}
    if "skipped_steps" in metrics:  # With float16.
      self._progress.skipped_steps = metrics["skipped_steps"]
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
      self._skip_or_fail(metrics)
    self._report(step, metrics, count)
    if line := self._diagnostics.finish_step(step, found):
      self._writer.write(step, line)

  def _skip_or_fail(self, metrics):
    """Log a skipped step; raise DivergedError if training cannot continue."""
    loss, loss_scale = metrics["loss"], metrics.get("loss_scale")
    values = f"loss {loss}, gradient norm {metrics['grad_norm']}"
    if loss_scale is None:
      self._fail(values)
    if not math.isfinite(loss) or loss_scale < 1:
      self._fail(f"{values}, loss scale {loss_scale:g}")
    _log.info(
      "step %d skipped: gradient overflowed float16; loss scale is now %g",
      self._progress.step,
      loss_scale,
    )

  def _report(self, step, metrics, count):
    """Log a step, and write its metrics every `progress_every` steps."""
    due = step % self._config.progress_every == 0
    quiet = time.monotonic() - self._timer.last_line
    if not due and quiet < _SECONDS_BETWEEN_LINES:
      return
    lr = float(self._experiment.lr_schedule(count))
    steps, seconds = self._lap(step)
    self._timer.log(metrics["loss"], lr, steps, seconds)
    if due:
      line = {
        f"train/{name}": value
        for name, value in {**metrics, "lr": lr}.items()
        if math.isfinite(value)  # JSON cannot represent others.
      }
      speed = progress_lib.images_per_second(steps, seconds, self._config.batch)
      measured = {"train/images_per_second": speed} if steps else {}
      self._writer.write(step, line, measured)

  def _fail(self, values):
    self._checkpoints.wait()
    last = self._checkpoints.latest_step()
    saved = "no checkpoint was saved"
    if last is not None:
      saved = f"the last checkpoint is of step {last}"
    wider = "" if self._state.loss_scale is None else ", or dtype float32,"
    raise DivergedError(
      f"step {self._progress.step}: training diverged ({values}); {saved};"
      f" try a smaller base_lr or grad_norm_clip{wider} in a new --workdir"
    )

  def _lap(self, step):
    steps, seconds = self._timer.lap(step)
    self._progress.timed_steps += steps
    self._progress.timed_seconds += seconds
    return steps, seconds

  def _evaluation_is_due(self):
    step = self._progress.step
    return step not in (0, self._progress.last_step) and (
      step % self._config.eval_every == 0 or step == self._config.total_steps
    )

  def _evaluate(self, stop):
    self._finish_step()
    progress = self._progress
    self._lap(progress.step)
    variables = self._state.evaluated
    result = self._evaluator(
      variables["params"], variables["batch_stats"], lambda: stop.requested
    )
    self._timer.restart()
    if result is None:
      return
    if not math.isfinite(result.loss):
      self._fail(f"test loss {result.loss}")
    self._writer.write(
      progress.step,
      {"test/loss": result.loss, "test/accuracy": result.accuracy},
    )
    if self._config.log_attention and self._draw_attention is not None:
      self._writer.write_images(
        progress.step,
        lambda: self._draw_attention(
          progress.step, self._experiment, variables
        ),
      )
      self._timer.restart()
    progress.last_step = progress.step
    progress.last_accuracy, progress.last_loss = result.accuracy, result.loss
    progress.examples_evaluated = result.examples
    if self._may_be_best() and result.accuracy > progress.best_accuracy:
      progress.best_accuracy = result.accuracy
      progress.best_step = progress.step
      self._checkpoints.save_best(variables, progress)
    best = f"{progress.best_accuracy:.4f} at step {progress.best_step}"
    _log.info(
      "step %d/%d  test loss %.4f  test accuracy %.4f  best %s",
      progress.step,
      self._config.total_steps,
      result.loss,
      result.accuracy,
      best if progress.best_step else "none before fade.end",
    )

  def _may_be_best(self):
    """Return whether no norm fades any more; the last model always counts."""
    schedule = self._experiment.model.config.norm_schedule
    at_end = self._progress.step == self._config.total_steps
    return schedule is None or at_end or self._passes() >= schedule.end

  def _passes(self):
    """Return the number of training passes, without skipped steps."""
    progress = self._progress
    steps = progress.step - progress.skipped_steps
    return steps * self._config.accum_steps

  def final_evaluation(self) -> scores.Evaluation:
    """Score the last weights on the test images and on training images.

    The training images are a random sample, at most as many as test images, and
    not augmented.
    """
    dataset = self._experiment.dataset
    evaluated = self._state.evaluated
    variables = evaluated["params"], evaluated["batch_stats"]
    # Not the first ones, which may be of one class. No run has this seed.
    images = len(dataset.train)
    chosen = dataset_lib.batch_indices(
      2**32, 1, min(len(dataset.test), images), images
    )
    train_images = loader.Loader(
      dataset.train.subset(np.sort(chosen)), self._experiment.mesh
    )
    on_training_images = self._evaluator.on(train_images)(*variables)
    assert on_training_images is not None  # Nothing stops it.
    return scores.evaluation(
      *self._evaluator.logits(*variables),
      dataset.class_names,
      weights="last step",
      step=self._progress.step,
      dataset=self._config.dataset,
      split=dataset.test_split,
      train_accuracy=on_training_images.accuracy,
      skipped_images=dataset.num_skipped,
    )

  def _save(self):
    progress = self._progress
    self._finish_step()
    self._writer.sync()
    if progress.step == self._checkpoints.latest_step():
      return
    self._lap(progress.step)
    progress.seconds = self._seconds_before + time.monotonic() - self._started
    self._checkpoints.save(self._state.to_checkpoint(), progress)
    self._timer.restart()
