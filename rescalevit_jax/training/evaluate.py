"""A split, every example once."""

from collections.abc import Callable
import dataclasses
import functools
import json
import logging
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import train_step

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
  """Of one evaluation.

  Attributes:
    loss: mean cross-entropy over the examples.
    accuracy: share of examples whose largest logit is the label's, in [0, 1].
    examples: how many were counted.
  """

  loss: float
  accuracy: float
  examples: int


def compiled_step(
  model: nn.Module, image_size: int, mesh: Mesh
) -> Callable[..., Any]:
  """Return `step.eval_step`, compiled when it is first called."""
  return jax.jit(
    functools.partial(train_step.eval_step, model=model, image_size=image_size),
    out_shardings=sharding.replicated(mesh),
  )


class Evaluator:
  """Evaluates a model on one split that lies on the devices.

  Args:
    model: a `VisionTransformer`.
    images: the split.
    image_size: edge of the model's input, in pixels.
    batch: images a step; the last batch, and one that the devices cannot share
      equally, is filled up with images that do not count.
    mesh: the devices.
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
    batch = min(batch, len(images))
    self._batch = -(-batch // mesh.size) * mesh.size
    self._by_device = sharding.split(mesh)
    self._step = compiled_step(model, image_size, mesh)

  def __call__(
    self,
    params: Any,
    batch_stats: Any,
    stopped: Callable[[], bool] = lambda: False,
  ) -> Result | None:
    """Returns the result, or None if `stopped` became true on the way."""
    sums = []
    start = line = time.monotonic()
    numbers = range(-(-len(self._images) // self._batch))
    with self._images.batches(self._places, numbers) as batches:
      for i in numbers:
        if stopped():
          return None
        if i >= 2:  # The device has one batch more to work on.
          jax.block_until_ready(sums[i - 2])
        if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
          line = time.monotonic()
          left = (line - start) / max(1, i - 1) * (len(numbers) - i + 1)
          _log.info(
            "evaluating: batch %d of %d, %.0f s left", i, len(numbers), left
          )
        mask = sharding.put(self._mask(i), self._by_device)
        sums.append(self._step(params, batch_stats, *next(batches), mask))
    sums = jax.device_get(sums)
    examples = len(self._images)
    return Result(
      loss=sum(float(s["loss"]) for s in sums) / examples,
      accuracy=sum(int(s["correct"]) for s in sums) / examples,
      examples=examples,
    )

  def _places(self, number):
    """Places of the examples of a batch, int32 [B]; the last one is filled."""
    first = number * self._batch
    places = np.arange(first, first + self._batch, dtype=np.int32)
    return np.minimum(places, len(self._images) - 1)

  def _mask(self, number):
    """Which of them count, bool [B]."""
    left = len(self._images) - number * self._batch
    return np.arange(self._batch) < left


def evaluate_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Evaluates a run's checkpoint, or an .npz, on the test split.

  Args:
    config: of the run; `eval_weights` says what to evaluate.
    workdir: the run's folder.

  Returns:
    What process 0 writes to eval.json: weights, step, loss, accuracy, examples.

  Raises:
    UserError: the weights are not there or not of this config's model.
  """
  workdir = pathlib.Path(workdir)
  result_lib.read_same_run(config, workdir)
  which = config.eval_weights
  if which == "pretrained":
    if config.pretrained_path is None:
      raise errors.UserError(
        "config: eval_weights is 'pretrained', but pretrained_path is not set"
      )
    experiment = experiment_lib.create(config)
    state, report = experiment_lib.load_pretrained(
      experiment, experiment.init_state()
    )
    missing = (*report.reinitialized, *report.initial, *report.carried)
    if missing:
      raise errors.UserError(
        f"{config.pretrained_path}: cannot be evaluated as it is: it has no"
        f" {missing[0]} for this model and data set"
      )
    if report.unsupported:
      raise errors.UserError(
        f"{config.pretrained_path}: cannot be evaluated as it is: the model has"
        f" no place for its {report.unsupported[0]}; choose the model.norm and"
        " other model.* keys that it was trained with"
      )
    gather = jax.jit(
      lambda tree: tree, out_shardings=sharding.replicated(experiment.mesh)
    )
    params, batch_stats = gather((state.params, state.batch_stats))
    # Faded norms are what the file says, whatever the config would train.
    model = experiment.model.clone(fade=None)
    weights, step = config.pretrained_path, 0
  else:
    *variables, step = checkpoint.load_variables(workdir, which)
    experiment = experiment_lib.create(config)
    model = experiment.model
    params, batch_stats = sharding.put(
      variables, sharding.replicated(experiment.mesh)
    )
    weights = f"{which} checkpoint"
  evaluator = Evaluator(
    model,
    experiment.test_loader,
    image_size=config.image_size,
    batch=config.batch_eval,
    mesh=experiment.mesh,
  )
  result = {
    "weights": weights,
    "step": step,
    **dataclasses.asdict(evaluator(params, batch_stats)),
  }
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_file.write(
      workdir / folder.EVALUATION, json.dumps(result, indent=2) + "\n"
    )
  return result
