"""Evaluation of a split: each example counts exactly once."""

from collections.abc import Callable
import copy
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
import ml_collections
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import scores
from rescalevit_jax.training import train_step

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of one evaluation.

  Attributes:
    loss: mean cross-entropy.
    accuracy: top-1 accuracy in [0, 1].
    examples: number of examples.
  """

  loss: float
  accuracy: float
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

  Args:
    model: a `VisionTransformer`.
    images: the split.
    image_size: edge of the model's input, in pixels.
    batch: images per step. Batches are padded to a multiple of the number of
      devices; a mask excludes the padding.
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


def evaluate_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Evaluate a run's checkpoint, or an .npz file.

  Args:
    config: of the run; `eval_weights` selects the weights, `eval_dataset` the
      images.
    workdir: the run's folder.

  Returns:
    The content of eval.json.

  Raises:
    UserError: the weights are missing or do not fit the config's model, the
      dataset has other classes, or a logit is not finite.
  """
  workdir = pathlib.Path(workdir)
  experiment, model, variables, info = _load(config, workdir)
  if config.eval_dataset is None:
    evaluator = create_evaluator(experiment, model)
    found = scores.evaluation(
      *evaluator.logits(*variables),
      experiment.dataset.class_names,
      **info,
      dataset=config.dataset,
      split=experiment.dataset.test_split,
    )
  else:
    found = _evaluate_others(experiment, model, variables, info)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    found.write(workdir, config.save_predictions)
  return found.summary


def probe_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Judge a run's representation by classifiers on its frozen features.

  Args:
    config: of the run; `eval_weights` selects the weights.
    workdir: the run's folder.

  Returns:
    The content of probe.json: accuracy and interval of k nearest neighbours and
    of a linear probe.

  Raises:
    UserError: the weights are missing or do not fit the config's model.
  """
  from rescalevit_jax.training import frozen_features

  workdir = pathlib.Path(workdir)
  experiment, model, variables, info = _load(config, workdir)
  evaluator = create_evaluator(experiment, model)
  _log.info("computing the features of the training images")
  train = evaluator.on(experiment.train_loader).features(*variables)
  test, labels = evaluator.features(*variables)
  classes = experiment.dataset.num_classes
  linear, penalty = frozen_features.linear_probe_logits(*train, test, classes)
  found = {
    **info,
    "dataset": config.dataset,
    "split": experiment.dataset.test_split,
    "examples": len(labels),
    "knn": scores.accuracy(
      frozen_features.knn_logits(*train, test, classes), labels
    ),
    "linear": scores.accuracy(linear, labels) | {"penalty": penalty},
  }
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    scores.write_json(workdir / folder.PROBE, found)
  return found


def _load(config, workdir):
  """Load the weights of `eval_weights`; return also what results say of them.

  Returns:
    Experiment, model, its variables and {"weights": ..., "step": ...}.
  """
  result_lib.read_same_run(config, workdir)
  experiment = experiment_lib.create(config, training=False)
  if config.eval_weights == "pretrained":
    model, variables = _load_pretrained(experiment)
    info = {"weights": config.pretrained_path, "step": 0}
  else:
    folder.check_class_names(workdir, experiment.dataset.class_names)
    *variables, step = checkpoint.load_variables(workdir, config.eval_weights)
    model = experiment.model
    replicated = sharding.replicated(experiment.mesh)
    variables = sharding.put(variables, replicated)
    info = {"weights": f"{config.eval_weights} checkpoint", "step": step}
  return experiment, model, variables, info


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


def _evaluate_others(experiment, model, variables, info):
  """Evaluate on `eval_dataset`: one dataset, or all configs of NAME/*."""
  config, own = experiment.config, experiment.dataset
  names = dataset_lib.expand(config.eval_dataset, config.tfds_data_dir)
  results = {}
  for i, name in enumerate(names, start=1):
    if len(names) > 1:
      _log.info("dataset %d/%d: %s", i, len(names), name)
    split, split_name, class_names = dataset_lib.load_test(
      name, config.tfds_data_dir, **config.data
    )
    if class_names != own.class_names:
      raise errors.UserError(
        f"config: eval_dataset ({name}) has the classes"
        f" {', '.join(class_names[:3])}, ..., and the run"
        f" {', '.join(own.class_names[:3])}, ...; choose a dataset with the"
        " run's classes"
      )
    evaluator = create_evaluator(experiment, model)
    images = loader.Loader(split, experiment.mesh)
    results[name] = scores.evaluation(
      *evaluator.on(images).logits(*variables),
      class_names,
      **info,
      dataset=name,
      split=split_name,
    )
  if len(results) == 1:
    return next(iter(results.values()))
  return scores.Suite(results)


def _load_pretrained(experiment):
  """Return the model and its variables, all of them from the .npz file."""
  path = experiment.config.pretrained_path
  if path is None:
    raise errors.UserError(
      "config: eval_weights is 'pretrained' without a file; set pretrained_path"
    )
  state, report = initial_state.load_pretrained(
    experiment, experiment.init_state()
  )
  missing = (*report.reinitialized, *report.initial, *report.carried)
  if missing:
    raise errors.UserError(
      f"{path}: cannot be evaluated, it has no {missing[0]} for this model and"
      " dataset; choose the model.* keys and the dataset of its training"
    )
  if report.unsupported:
    raise errors.UserError(
      f"{path}: cannot be evaluated, the model has no place for its"
      f" {report.unsupported[0]}; choose the model.* keys of its training"
    )
  gather = jax.jit(
    lambda tree: tree, out_shardings=sharding.replicated(experiment.mesh)
  )
  # The norms stay as in the file; the config's schedule is ignored.
  config = dataclasses.replace(experiment.model.config, norm_schedule=None)
  model = experiment.model.clone(config=config)
  return model, gather((state.params, state.batch_stats))
