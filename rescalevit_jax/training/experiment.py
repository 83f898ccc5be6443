"""What a config describes: data, model, optimizer, devices, first state."""

from collections.abc import Callable
import dataclasses
import functools
import logging
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.augment import mixing
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.models import fade
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit
from rescalevit_jax.models.ops import attention
from rescalevit_jax.optim import optimizers
from rescalevit_jax.optim import schedule
from rescalevit_jax.pretrained import load
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.training import calibration
from rescalevit_jax.training import progress
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The parts of a run, ready to work together.

  Attributes:
    config: the validated config.
    mesh: the devices.
    dataset: both splits, or None where nothing is run.
    model: a `VisionTransformer`.
    lr_schedule: the learning rate as a function of the steps already done.
    optimizer: of the parameters.
  """

  config: ml_collections.ConfigDict
  mesh: Mesh
  dataset: dataset_lib.Dataset | None
  model: nn.Module
  lr_schedule: optax.Schedule
  optimizer: optax.GradientTransformation

  def init_state(self) -> train_state.TrainState:
    """Returns the state at step 0, on every device."""
    init = jax.jit(self._init, out_shardings=self.shardings())
    return init(np.uint32(self.config.seed))

  def abstract_state(self) -> train_state.TrainState:
    """Returns shapes, types and places of the state."""
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      self._shapes,
      self.shardings(),
    )

  def shardings(self) -> train_state.TrainState:
    """Returns where the arrays of the state lie."""
    return sharding.create(self._shapes, self.mesh, self.config.sharding.fsdp)

  @functools.cached_property
  def train_loader(self) -> loader.Loader:
    """The training split."""
    return loader.Loader(self.dataset.train, self.mesh)

  @functools.cached_property
  def test_loader(self) -> loader.Loader:
    """The split that the run is evaluated on."""
    return loader.Loader(self.dataset.test, self.mesh)

  def train_indices(self, step: int) -> np.ndarray:
    """Returns the places of a step's images in that split, int32 [A, B]."""
    config = self.config
    places = dataset_lib.batch_indices(
      config.seed, step, config.batch, len(self.dataset.train)
    )
    return places.reshape(config.accum_steps, -1)

  def train_step(self, step: int, skipped: int = 0) -> Callable[..., Any]:
    """Returns `step.train_step`, compiled when it is first called.

    Its arguments are the state, which is given away, and images, labels and
    seed. The seed is one of them, and not part of the program, so that runs
    with other seeds find it compiled.

    Args:
      step: number of the step, from 1. Norms that do less after their first
        passes have a second program, from step `settled_from` on.
      skipped: steps before it that a loss scale made the run skip.
    """
    first = self.settled_from
    return self._train_steps[first is not None and step - skipped >= first]

  @functools.cached_property
  def settled_from(self) -> int | None:
    """The first step whose passes all come after `Norm.SETTLES_AFTER`.

    None: all steps are the same, or may be skipped, as in float16.
    """
    passes = norms.NORMS[self.config.model.norm].SETTLES_AFTER
    if not passes or self.model.dtype == jnp.float16:
      return None
    return 1 + -(-passes // self.config.accum_steps)

  @functools.cached_property
  def _train_steps(self):
    """The training step by whether norms have settled."""

    def compiled(settled):
      step = functools.partial(
        train_step_lib.train_step,
        optimizer=self.optimizer,
        ema_decay=self.config.ema_decay,
        settled=settled,
        **self.gradient_options(),
      )
      shardings = (self.shardings(), sharding.replicated(self.mesh))
      return jax.jit(step, out_shardings=shardings, donate_argnums=0)

    return {settled: compiled(settled) for settled in (False, True)}

  def gradient_options(self) -> dict[str, Any]:
    """Returns the arguments of `step.gradient` that the config decides."""
    everywhere, places = sharding.replicated(self.mesh), self.shardings()
    options = self._inputs()
    if self.config.sharding.fsdp:
      constrain = jax.lax.with_sharding_constraint
      options["gather"] = lambda params: constrain(params, everywhere)
      options["scatter"] = lambda grads: constrain(grads, places.params)
    return options

  def calibrate(
    self, state: train_state.TrainState, batches: int = calibration.BATCHES
  ) -> train_state.TrainState:
    """Returns a state at step 0 with its norms calibrated; see `calibrate`.

    Norms that gather statistics in training have those of as many batches.
    """
    steps = range(1, batches + 1)
    with self.train_loader.batches(self.train_indices, steps) as batches:
      return calibration.calibrate(
        state,
        batches,
        np.uint32(self.config.seed),
        places=self.shardings(),
        **self._inputs(),
      )

  def _inputs(self):
    """Returns the model and what happens to its training images before it."""
    config = self.config
    return {
      "model": self.model,
      "augment": preprocess.Augment(**config.augment),
      "image_size": config.image_size,
      "mixing": mixing.Mixing(
        config.label_smoothing, config.mixup, config.cutmix
      ),
    }

  @functools.cached_property
  def _shapes(self):
    return jax.eval_shape(self._init, np.uint32(self.config.seed))

  @functools.cached_property  # JAX traces the same object once for all uses.
  def _init(self):
    return functools.partial(
      train_state.init_state,
      self.model,
      self.optimizer,
      self.config.image_size,
      averages=self.config.ema_decay > 0,
    )


def create(config: ml_collections.ConfigDict) -> Experiment:
  """Builds the parts of a run from its config.

  Raises:
    UserError: a value of the config does not do, or the data are not there.
  """
  config_lib.validate(config)
  mesh = sharding.create_mesh()
  sharding.check_batch(config.batch, config.accum_steps, mesh)
  progress.warn_of_idle_gpu()
  # Its mistakes show before the data are read.
  _log_attention(config, create_model(config, 1))
  dataset = load_dataset(config)
  return build(config, mesh, dataset.num_classes, dataset)


def _log_attention(config, model):
  """Log which implementation of attention a GPU runs, and why."""
  if accelerator.platform() != "gpu":
    return
  if config.deterministic:
    reason = "deterministic=True"
  elif config.model.attention != "auto":
    reason = "model.attention"
  else:
    head_dim = model.hidden_size // model.num_heads
    reason = attention.choose(model.dtype, head_dim).reason
  _log.info("attention by %s: %s", model.attention, reason)


def build(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  num_classes: int,
  dataset: dataset_lib.Dataset | None = None,
) -> Experiment:
  """Put together the parts of a run.

  Args:
    config: the validated config.
    mesh: the devices, which need not exist if nothing is run on them.
    num_classes: width of the head.
    dataset: None to compile only.
  """
  lr_schedule = schedule.create(
    config.base_lr,
    config.warmup_steps,
    config.total_steps,
    config.decay_type,
  )
  optimizer = optimizers.create(
    config.optimizer,
    lr_schedule,
    momentum=config.momentum,
    adam_b2=config.adam_b2,
    weight_decay=config.weight_decay,
    grad_norm_clip=config.grad_norm_clip,
    agc=config.agc,
    scalar_lr_mult=config.scalar_lr_mult,
  )
  return Experiment(
    config,
    mesh,
    dataset,
    create_model(config, num_classes),
    lr_schedule,
    optimizer,
  )


def _check_shift(pixels, dataset):
  """Raises UserError if a shift by so many pixels would leave only black."""
  if not pixels:
    return
  edge = min(dataset.train.read([0])[0].shape[1:3])
  if pixels >= edge:
    raise errors.UserError(
      f"config: augment.pad_crop is {pixels}, but images of {dataset.name} are"
      f" {edge} pixels; choose less, such as {max(1, edge // 8)}"
    )


def load_dataset(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  """Opens a run's data set; see `data.load`."""
  return dataset_lib.load(config.dataset, config.tfds_data_dir, **config.data)


def create_model(
  config: ml_collections.ConfigDict, num_classes: int
) -> vit.VisionTransformer:
  """Builds the model that a config describes.

  Raises:
    UserError: sizes that do not fit together.
  """
  keys = dict(config.model)
  if config.deterministic:  # cuDNN's gradient adds up in any order.
    if keys["attention"] == "cudnn":
      raise errors.UserError(
        "config: model.attention is 'cudnn', which is not deterministic;"
        " choose auto"
      )
    keys["attention"] = "xla"
  if config.model.norm == "Fade":
    keys["fade"] = _fade_schedule(config)
  return models.create(
    config.model_name,
    num_classes=num_classes,
    image_size=config.image_size,
    dtype=config.dtype,
    **keys,
  )


def _fade_schedule(config):
  passes = config.total_steps * config.accum_steps
  return fade.Schedule(
    config.fade.begin * passes,
    config.fade.end * passes,
    config.fade.site_fraction,
    config.fade.separate_cls,
    config.fade.alpha,
  )


def initial_state(experiment: Experiment) -> train_state.TrainState:
  """Returns where a new run begins: an .npz if there is one, or scratch.

  Norms that need it are calibrated, but for those that the file brought.

  Raises:
    UserError: the file does not do, or a shift of the images (`pad_crop`).
  """
  config, state = experiment.config, experiment.init_state()
  _check_shift(config.augment.pad_crop, experiment.dataset)
  calibrated = (
    config.calibration in norms.NORMS[config.model.norm].CALIBRATED_BY
  )
  if config.pretrained_path is None:
    _log.info("starting from scratch, seed %d", config.seed)
  else:
    _log.info("starting from %s", config.pretrained_path)
    state, report = load_pretrained(experiment, state)
    calibrated &= any(key.endswith("/alpha") for key in report.initial)
  if not calibrated:
    return state
  _log.info(
    "calibrating norms on the first %d training batches", calibration.BATCHES
  )
  return experiment.calibrate(state)


def load_pretrained(
  experiment: Experiment, state: train_state.TrainState
) -> tuple[train_state.TrainState, load.Report]:
  """Replaces a state's weights by those of `pretrained_path`."""
  config = experiment.config
  params, batch_stats, report = load.load(
    config.pretrained_path,
    state.params,
    state.batch_stats,
    reinit_head=config.reinit_head,
    allow_nonfinite=config.pretrained_allow_nonfinite,
  )
  _log.info("weights of %s\n%s", config.pretrained_path, report.summary())
  batch_stats = fade.reset_counters(batch_stats)
  places = experiment.shardings()
  params, batch_stats = jax.tree.map(
    sharding.put, (params, batch_stats), (places.params, places.batch_stats)
  )
  return state.replace(params=params, batch_stats=batch_stats), report
