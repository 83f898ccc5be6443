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

from rescalevit_jax import checkpoint
from rescalevit_jax import errors
from rescalevit_jax import experiment as experiment_lib
from rescalevit_jax import sharding
from rescalevit_jax import step as step_lib
from rescalevit_jax import writers

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


class Evaluator:
  """Evaluates a model on one split that lies on the devices.

  Args:
    model: a `VisionTransformer`.
    images: [M, H, W, 3] uint8, replicated on the mesh.
    labels: [M] int32, likewise.
    image_size: edge of the model's input, in pixels.
    batch: images a step; the last batch, and one that the devices cannot share
      equally, is filled up with images that do not count.
    mesh: the devices.
  """

  def __init__(
    self,
    model: nn.Module,
    images: jax.Array,
    labels: jax.Array,
    *,
    image_size: int,
    batch: int,
    mesh: Mesh,
  ):
    self._images, self._labels = images, labels
    batch = min(batch, len(images))
    batch = -(-batch // mesh.size) * mesh.size
    by_device = sharding.split(mesh)
    self._batches = [
      sharding.put(_filled(start, len(images), batch), by_device)
      for start in range(0, len(images), batch)
    ]
    self._step = jax.jit(
      functools.partial(step_lib.eval_step, model=model, image_size=image_size),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self,
    params: Any,
    batch_stats: Any,
    stopped: Callable[[], bool] = lambda: False,
  ) -> Result | None:
    """Returns the result, or None if `stopped` became true on the way."""
    sums = []
    start = line = time.monotonic()
    for i, (indices, mask) in enumerate(self._batches):
      if stopped():
        return None
      if i >= 2:  # The device has one batch more to work on.
        jax.block_until_ready(sums[i - 2])
      if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
        line = time.monotonic()
        left = (line - start) / max(1, i - 1) * (len(self._batches) - i + 1)
        _log.info(
          "evaluating: batch %d of %d, %.0f s left",
          i,
          len(self._batches),
          left,
        )
      sums.append(
        self._step(
          params, batch_stats, self._images, self._labels, indices, mask
        )
      )
    sums = jax.device_get(sums)
    examples = len(self._images)
    return Result(
      loss=sum(float(s["loss"]) for s in sums) / examples,
      accuracy=sum(int(s["correct"]) for s in sums) / examples,
      examples=examples,
    )


def evaluate_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Evaluates a run's checkpoint, or an .npz, on the test split.

  Args:
    config: of the run; `eval_weights` says what to evaluate.
    workdir: the run's folder.

  Returns:
    What is written to eval.json: weights, step, loss, accuracy, examples.

  Raises:
    UserError: the weights are not there or not of this config's model.
  """
  workdir = pathlib.Path(workdir)
  experiment_lib.check_same_run(config, workdir)
  which = config.eval_weights
  if which == "pretrained":
    if config.pretrained_path is None:
      raise errors.UserError(
        "config: eval_weights is 'pretrained', but pretrained_path is not set"
      )
    experiment = experiment_lib.create(config)
    state, report = experiment_lib.load_pretrained(
      experiment, experiment.scratch()
    )
    if untrained := (*report.reinitialized, *report.initial):
      raise errors.UserError(
        f"{config.pretrained_path}: cannot be evaluated as it is: it has no"
        f" {untrained[0]} for this model and data set"
      )
    params, batch_stats = state.params, state.batch_stats
    weights, step = config.pretrained_path, 0
  else:
    params, batch_stats, step = checkpoint.load_variables(workdir, which)
    experiment = experiment_lib.create(config)
    weights = f"{which} checkpoint"
  everywhere = sharding.replicated(experiment.mesh)
  dataset = experiment.dataset
  evaluator = Evaluator(
    experiment.model,
    *sharding.put((dataset.test.images, dataset.test.labels), everywhere),
    image_size=config.image_size,
    batch=config.batch_eval,
    mesh=experiment.mesh,
  )
  result = {
    "weights": weights,
    "step": step,
    **dataclasses.asdict(
      evaluator(*sharding.put((params, batch_stats), everywhere))
    ),
  }
  workdir.mkdir(parents=True, exist_ok=True)
  writers.write_file(workdir / "eval.json", json.dumps(result, indent=2) + "\n")
  return result


def _filled(start, total, batch):
  """Places [batch] int32 of a batch, and which of them count, [batch] bool."""
  places = np.arange(start, start + batch, dtype=np.int32)
  return np.minimum(places, total - 1), places < total
