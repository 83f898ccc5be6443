"""Evaluation of a split: each example counts exactly once."""

from collections.abc import Callable
import copy
import dataclasses
import functools
import logging
import time
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
import numpy as np

from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import train_step

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of one evaluation."""

  loss: float  # Mean cross-entropy.
  accuracy: float  # In [0, 1].
  examples: int


def compiled_step(
  model: nn.Module, image_size: int, mesh: Mesh
) -> jax.stages.Wrapped:
  """Return `train_step.eval_step`, jitted; logits and labels stay sharded."""
  sums, examples = sharding.replicated(mesh), sharding.split(mesh)
  return jax.jit(
    functools.partial(train_step.eval_step, model=model, image_size=image_size),
    out_shardings={
      "loss": sums,
      "correct": sums,
      "logits": examples,
      "labels": examples,
    },
  )


class Evaluator:
  """Evaluates a model on a split.

  Batches are padded to a multiple of the number of devices; a mask excludes the
  padding.
  """

  def __init__(
    self,
    model: nn.Module,
    images: loader.Loader,
    *,
    image_size: int,
    batch: int,
    mesh: Mesh,
  ):
    self._images = images
    self._model, self._image_size = model, image_size
    batch = min(batch, len(images))
    self._batch = -(-batch // mesh.size) * mesh.size
    self._by_device = sharding.split(mesh)
    self._step = compiled_step(model, image_size, mesh)

  def on(self, images: loader.Loader) -> "Evaluator":
    """Return an evaluator of another split with the same compiled step."""
    other = copy.copy(self)
    other._images = images
    return other

  def __call__(
    self,
    params: Any,
    batch_stats: Any,
    stopped: Callable[[], bool] = lambda: False,
  ) -> Result | None:
    """Return the result, or None if `stopped` became true."""
    found = self._run(params, batch_stats, ("loss", "correct"), stopped)
    if found is None:
      return None
    examples = len(self._images)
    return Result(
      loss=sum(float(x["loss"]) for x in found) / examples,
      accuracy=sum(int(x["correct"]) for x in found) / examples,
      examples=examples,
    )

  def logits(
    self, params: Any, batch_stats: Any
  ) -> tuple[Float32[np.ndarray, "N C"], Int32[np.ndarray, " N"]]:
    """Return the logits and labels of all examples, in the split's order."""
    return self._collect(params, batch_stats, "logits")

  def features(
    self, params: Any, batch_stats: Any
  ) -> tuple[Float32[np.ndarray, "N D"], Int32[np.ndarray, " N"]]:
    """Return the inputs of the head and the labels of all examples."""
    other = copy.copy(self)
    other._step = jax.jit(
      functools.partial(
        train_step.feature_step, model=self._model, image_size=self._image_size
      ),
      out_shardings=self._by_device,
    )
    return other._collect(params, batch_stats, "features")

  def _collect(self, params, batch_stats, name):
    found = self._run(params, batch_stats, (name, "labels"))
    values, labels = (
      np.concatenate([x[key] for x in found])[: len(self._images)]
      for key in (name, "labels")
    )
    return values.astype(np.float32), labels

  def _run(self, params, batch_stats, keys, stopped=lambda: False):
    """Return some outputs of the step for all batches; None if stopped."""
    found = []
    start = line = time.monotonic()
    numbers = range(-(-len(self._images) // self._batch))
    with self._images.batches(self._indices, numbers) as batches:
      for i in numbers:
        if stopped():
          return None
        if i >= 2:  # The device still has one batch to compute.
          found[i - 2] = _fetch(found[i - 2])
        if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
          line = time.monotonic()
          left = (line - start) / max(1, i - 1) * (len(numbers) - i + 1)
          _log.info(
            "evaluating: batch %d/%d  ETA %.0f s", i, len(numbers), left
          )
        mask = sharding.put(self._mask(i), self._by_device)
        outputs = self._step(params, batch_stats, *next(batches), mask)
        found.append({key: outputs[key] for key in keys})
    found[-2:] = map(_fetch, found[-2:])
    return found

  def _indices(self, number):
    """Return the indices of a batch; padding repeats the last example."""
    first = number * self._batch
    indices = np.arange(first, first + self._batch, dtype=np.int32)
    return np.minimum(indices, len(self._images) - 1)

  def _mask(self, number):
    """Return a mask that is False for padding."""
    left = len(self._images) - number * self._batch
    return np.arange(self._batch) < left


def _fetch(outputs):
  """Copy outputs to the host, with the parts of other processes."""

  def fetch(x):
    if x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(fetch, outputs)


def create_evaluator(
  experiment: experiment_lib.Experiment, model: nn.Module | None = None
) -> Evaluator:
  """Create the evaluator of a run's test split."""
  return Evaluator(
    model or experiment.model,
    experiment.test_loader,
    image_size=experiment.config.image_size,
    batch=experiment.config.batch_eval,
    mesh=experiment.mesh,
  )
