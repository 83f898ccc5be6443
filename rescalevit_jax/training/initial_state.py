"""The state at step 0: from scratch or pretrained weights, calibrated."""

import logging

import jax

from rescalevit_jax import errors
from rescalevit_jax.distributed import sharding
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import traits
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import published
from rescalevit_jax.training import calibration
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import train_state

_log = logging.getLogger(__name__)


def create(experiment: experiment_lib.Experiment) -> train_state.TrainState:
  """Return the state at step 0, from `pretrained_path` or from scratch.

  Norms are calibrated if the config requires it and the file has no calibrated
  values.
  """
  config, state = experiment.config, experiment.init_state()
  _check_shift(config.augment.pad_crop, experiment.dataset)
  Norm = norms.NORMS[config.model.norm]
  calibrated = issubclass(Norm, traits.Calibrated) and Norm.is_calibrated_by(
    config.calibration, config.model.alpha_init
  )
  if config.pretrained_path is None:
    _log.info("starting from scratch, seed %d", config.seed)
  else:
    _log.info("starting from %s", config.pretrained_path)
    state, report = load_pretrained(experiment, state)
    if issubclass(Norm, traits.Calibrated):
      suffix = f"/{Norm.PARAMETER}"
      calibrated &= not any(key.endswith(suffix) for key in report.loaded)
  if not calibrated:
    return state
  _log.info(
    "calibrating norms on the first %d training batches",
    calibration.NUM_BATCHES,
  )
  return experiment.calibrate(state)


def load_pretrained(
  experiment: experiment_lib.Experiment, state: train_state.TrainState
) -> tuple[train_state.TrainState, load.Report]:
  """Return a state with the weights of `pretrained_path`, and the report."""
  config = experiment.config
  params, batch_stats, report = load.load(
    published.find(config.pretrained_path),
    state.params,
    state.batch_stats,
    reinit_head=config.reinit_head,
    allow_nonfinite=config.pretrained_allow_nonfinite,
  )
  _log.info("weights of %s\n%s", config.pretrained_path, report.summary())
  Norm = norms.NORMS[config.model.norm]
  if issubclass(Norm, gradual.Gradual):
    batch_stats = Norm.reset_counters(batch_stats)
  shardings = experiment.shardings()
  params, batch_stats = jax.tree.map(
    sharding.put,
    (params, batch_stats),
    (shardings.params, shardings.batch_stats),
  )
  return state.with_variables(params, batch_stats), report


def _check_shift(pixels, dataset):
  """Raise UserError if a shift by `pixels` may leave no pixel."""
  if not pixels:
    return
  edge = min(dataset.train.read([0])[0].shape[1:3])
  if pixels >= edge:
    raise errors.UserError(
      f"config: augment.pad_crop is {pixels}, but images of {dataset.name} are"
      f" {edge} pixels; lower it, such as to {max(1, edge // 8)}"
    )
