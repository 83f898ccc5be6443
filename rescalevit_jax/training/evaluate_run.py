"""Evaluation of a run's checkpoint, or of a checkpoint file, by command."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import folder as folder_data
from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import scores

_log = logging.getLogger(__name__)


def evaluate_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Evaluate a run's checkpoint, or an .npz file; return the eval.json.

  In the config, `eval_weights` selects the weights, and `eval_dataset` and
  `eval_split` the images.
  """
  workdir = pathlib.Path(workdir)
  names = _datasets(config)
  if len(names) > 1 and config.save_predictions:
    raise errors.UserError(
      "config: save_predictions (True) supports one dataset, but eval_dataset"
      f" ({config.eval_dataset}) selects several; set save_predictions=False"
    )
  output = folder.evaluation(workdir, config)
  experiment, model, variables, info = _load(config, workdir)
  evaluator = evaluate.create_evaluator(experiment, model)
  results = {}
  for i, name in enumerate(names, start=1):
    if len(names) > 1:
      _log.info("dataset %d/%d: %s", i, len(names), name)
    images, split, skipped = _images(experiment, name)
    logits, labels = evaluator.on(images).logits(*variables)
    results[name] = scores.evaluation(
      logits,
      labels,
      experiment.dataset.class_names,
      **info,
      dataset=name,
      split=split,
      skipped_images=skipped,
    )
  is_first = jax.process_index() == 0
  if len(results) == 1:
    if is_first:
      results[name].write(_output(output), config.save_predictions)
    return results[name].summary
  found = scores.of_suite({k: x.summary for k, x in results.items()})
  if is_first:
    atomic_file.write_json(_output(output) / folder.EVALUATION, found)
  return found


def probe_run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Judge a run's representation by classifiers on its frozen features.

  The config selects weights and images, as in `evaluate_run`.

  Returns:
    The content of probe.json: accuracy and interval of k nearest neighbors and
    of a linear probe.
  """
  from rescalevit_jax.training import frozen_features

  workdir = pathlib.Path(workdir)
  name, *others = _datasets(config)
  if others:
    raise errors.UserError(
      f"config: eval_dataset ({config.eval_dataset}) is {len(others) + 1}"
      " datasets; choose one of them to probe"
    )
  output = folder.evaluation(workdir, config)
  experiment, model, variables, info = _load(config, workdir)
  images, split, _ = _images(experiment, name)
  evaluator = evaluate.create_evaluator(experiment, model)
  _log.info("computing the features of the training images")
  train = evaluator.on(experiment.train_loader).features(*variables)
  test, labels = evaluator.on(images).features(*variables)
  if not (np.isfinite(train[0]).all() and np.isfinite(test).all()):
    raise errors.UserError(
      f"{info['weights']}: the features are not finite; choose other weights,"
      " or dtype=float32"
    )
  classes = experiment.dataset.num_classes
  linear, penalty = frozen_features.linear_probe_logits(*train, test, classes)
  found = {
    **info,
    "dataset": name,
    "split": split,
    "examples": len(labels),
    "knn": scores.accuracy(
      frozen_features.knn_logits(*train, test, classes), labels
    ),
    "linear": scores.accuracy(linear, labels) | {"penalty": penalty},
  }
  if jax.process_index() == 0:
    atomic_file.write_json(_output(output) / folder.PROBE, found)
  return found


def _load(config, workdir):
  """Return experiment, model, variables and {"weights": ..., "step": ...}."""
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


def _datasets(config):
  """Return the names of the datasets to evaluate on: one, or all of NAME/*."""
  if config.eval_dataset is None:
    return [config.dataset]
  return dataset_lib.expand(config.eval_dataset, config.tfds_data_dir)


def _images(experiment, name):
  """Return the images, their split, and the number of images left out."""
  config, own = experiment.config, experiment.dataset
  if config.eval_dataset is None and config.eval_split is None:
    return experiment.test_loader, own.test_split, own.num_skipped
  keys = dict(config.data)
  if name != config.dataset or config.eval_split is not None:
    # The run's own split is of another dataset, or not the one to evaluate.
    keys |= {"test_split": config.eval_split, "split_key": "eval_split"}
  images, split, class_names, skipped = dataset_lib.load_test(
    name, config.tfds_data_dir, **keys
  )
  numbers = tuple(map(str, range(own.num_classes)))
  related = name.startswith(f"{config.dataset}_")
  # A folder always names its classes.
  is_folder = name.startswith(folder_data.PREFIX)
  if class_names == numbers and related and not is_folder:
    # Such as cifar10_1. Others may have numbers for names, such as digits.
    _log.warning(
      "%s does not name its classes; assuming the run's class order", name
    )
  elif class_names != own.class_names:
    raise errors.UserError(
      f"config: eval_dataset ({name}) has the classes"
      f" {', '.join(class_names[:3])}, ..., and the run"
      f" {', '.join(own.class_names[:3])}, ...; choose a dataset with the"
      " run's classes"
    )
  return loader.Loader(images, experiment.mesh), split, skipped


def _output(output):
  """Create the folder for the results; return it."""
  output.mkdir(parents=True, exist_ok=True)
  return output


def _load_pretrained(experiment):
  """Return the model and its variables, all of them from the .npz file."""
  path = experiment.config.pretrained_path
  if path is None:
    raise errors.UserError(
      "config: eval_weights (pretrained) needs pretrained_path, which is None;"
      " set it"
    )
  state, report = initial_state.load_pretrained(
    experiment, experiment.init_state()
  )
  missing = (*report.reinitialized, *report.initial, *report.carried)
  if missing:
    raise errors.UserError(
      f"{path}: cannot be evaluated, it has no {missing[0]} that fits this"
      " model and dataset; choose the model.* keys and the dataset of its"
      " training"
    )
  if report.unsupported:
    raise errors.UserError(
      f"{path}: cannot be evaluated, the model has no array"
      f" {report.unsupported[0]}; choose the model.* keys of its training"
    )
  if report.resized:
    _log.warning(
      "%s: the position embedding is resized to image_size=%d; the results are"
      " not those of its own image size",
      path,
      experiment.config.image_size,
    )
  gather = jax.jit(
    lambda tree: tree, out_shardings=sharding.replicated(experiment.mesh)
  )
  # The norms stay as in the file; the config's schedule is ignored.
  config = dataclasses.replace(experiment.model.config, norm_schedule=None)
  model = experiment.model.clone(config=config)
  return model, gather((state.params, state.batch_stats))
