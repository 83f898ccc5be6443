"""The parts of a run, built from its config: data, model, optimizer, step."""

import dataclasses
import functools
import logging
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Int32
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
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import attention
from rescalevit_jax.optim import groups
from rescalevit_jax.optim import lr_schedule as lr_schedule_lib
from rescalevit_jax.optim import optimizers
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.training import calibration
from rescalevit_jax.training import progress
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The parts of a run."""

  config: ml_collections.ConfigDict
  mesh: Mesh
  loaded_dataset: dataset_lib.Dataset | None  # None to compile only.
  model: nn.Module
  lr_schedule: optax.Schedule  # Of the number of steps done.
  optimizer: optax.GradientTransformation

  @property
  def dataset(self) -> dataset_lib.Dataset:
    """Both splits."""
    if self.loaded_dataset is None:
      raise ValueError("an experiment to compile only has no dataset")
    return self.loaded_dataset

  def init_state(self) -> train_state.TrainState:
    """Return the state at step 0."""
    init = jax.jit(self._init, out_shardings=self.shardings())
    return init(np.uint32(self.config.seed))

  def abstract_state(self) -> train_state.TrainState:
    """Return shapes, dtypes and shardings of the state."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      self._shapes,
      self.shardings(),
    )

  def shardings(self) -> train_state.TrainState:
    """Return the shardings of the state."""
    return sharding.create(self._shapes, self.mesh, self.config.sharding.fsdp)

  @functools.cached_property
  def train_loader(self) -> loader.Loader:
    """The training split."""
    return loader.Loader(self.dataset.train, self.mesh)

  @functools.cached_property
  def test_loader(self) -> loader.Loader:
    """The split for evaluation: test images, or held-out training images."""
    return loader.Loader(self.dataset.test, self.mesh)

  def train_indices(self, step: int) -> Int32[np.ndarray, "A B"]:
    """Return the indices of a step's images in the training split."""
    config = self.config
    indices = dataset_lib.batch_indices(
      config.seed, step, config.batch, len(self.dataset.train)
    )
    return indices.reshape(config.accum_steps, -1)

  def train_step(self, step: int, skipped: int = 0) -> jax.stages.Wrapped:
    """Return the jitted training step with this number, from 1.

    Its arguments are the state, which is donated, images, labels and seed. The
    seed is an argument because runs with other seeds then share the program.
    Norms that do less after their first passes have a second program from step
    `settled_from` on, not counting steps that were skipped in float16.
    """
    first = self.settled_from
    return self._train_steps[first is not None and step - skipped >= first]

  @functools.cached_property
  def settled_from(self) -> int | None:
    """The first step that needs no calibration, see `Settling.SETTLES_AFTER`.

    None if all steps are the same or may be skipped (float16).
    """
    Norm = norms.NORMS[self.config.model.norm]
    if not issubclass(Norm, traits.Settling):
      return None
    if self.model.config.dtype == "float16":
      return None
    return 1 + -(-Norm.SETTLES_AFTER // self.config.accum_steps)

  @functools.cached_property
  def _train_steps(self):
    """The training step, before and after norms have settled."""
    step = functools.partial(
      train_step_lib.train_step,
      optimizer=self.optimizer,
      ema_decay=self.config.ema_decay,
      **self.gradient_options(),
    )
    shardings = (self.shardings(), sharding.replicated(self.mesh))
    return {
      settled: jax.jit(
        functools.partial(step, settled=settled),
        out_shardings=shardings,
        donate_argnums=0,
      )
      for settled in (False, True)
    }

  def gradient_options(self) -> dict[str, Any]:
    """Return the arguments of `train_step.gradient` given by the config."""
    replicated, shardings = sharding.replicated(self.mesh), self.shardings()
    options = {**self._inputs(), "sam_rho": self.config.sam_rho}
    table = groups.parse(self.config.lr_mult)
    if any(factor == 0 for _, factor in table):
      options["freeze"] = functools.partial(groups.freeze, table)
    if self.config.sharding.fsdp:
      constrain = jax.lax.with_sharding_constraint
      options["gather"] = lambda params: constrain(params, replicated)
      options["scatter"] = lambda grads: constrain(grads, shardings.params)
    return options

  def calibrate(
    self,
    state: train_state.TrainState,
    num_batches: int = calibration.NUM_BATCHES,
  ) -> train_state.TrainState:
    """Return a state at step 0 with calibrated norms; see `calibration`.

    Running statistics of other norms are updated too.
    """
    steps = range(1, num_batches + 1)
    with self.train_loader.batches(self.train_indices, steps) as batches:
      return calibration.calibrate(
        state,
        batches,
        np.uint32(self.config.seed),
        shardings=self.shardings(),
        **self._inputs(),
      )

  def _inputs(self):
    """Return the model and the augmentation of its training images."""
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


def create(
  config: ml_collections.ConfigDict, *, training: bool = True
) -> Experiment:
  """Build the parts of a run from its config.

  Without `training`, the training batch need not fit the devices.
  """
  config_lib.validate(config)
  mesh = sharding.create_mesh()
  if training:
    sharding.check_batch(config.batch, config.accum_steps, mesh)
  progress.warn_of_idle_gpu()
  # Report errors in the model's keys before loading data.
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
    c = model.config
    problem = attention.cudnn_problem(
      jnp.dtype(c.dtype), c.head_dim, c.logit_cap
    )
    reason = problem or "fused, stores no probabilities"
  _log.info("attention by %s: %s", model.config.attention, reason)


def build(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  num_classes: int,
  dataset: dataset_lib.Dataset | None = None,
) -> Experiment:
  """Build the parts of a run from a valid config.

  To compile only, the devices need not exist, and there is no dataset.
  """
  lr_schedule = lr_schedule_lib.create(
    config.base_lr,
    config.warmup_steps,
    config.total_steps,
    config.decay_type,
    config.decay_steps,
    config.min_lr,
  )
  optimizer = optimizers.create(
    config.optimizer,
    lr_schedule,
    momentum=config.momentum,
    adam_b2=config.adam_b2,
    weight_decay=config.weight_decay,
    grad_norm_clip=config.grad_norm_clip,
    agc=config.agc,
    spectral_cap=config.spectral_cap,
    lr_mult=config.lr_mult,
    wd_mult=config.wd_mult,
    layer_decay=config.layer_decay,
  )
  return Experiment(
    config,
    mesh,
    dataset,
    create_model(config, num_classes),
    lr_schedule,
    optimizer,
  )


def load_dataset(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  """Open a run's dataset; see `data.dataset.load`."""
  return dataset_lib.load(config.dataset, config.tfds_data_dir, **config.data)


def create_model(
  config: ml_collections.ConfigDict, num_classes: int
) -> vit.VisionTransformer:
  """Build the model of a config."""
  keys = dict(config.model)
  if config.deterministic:  # cuDNN's gradient adds up in any order.
    if keys["attention"] == "cudnn":
      raise errors.UserError(
        "config: model.attention (cudnn) conflicts with deterministic"
        " (True); choose auto"
      )
    keys["attention"] = "xla"
  Norm = norms.NORMS[config.model.norm]
  if issubclass(Norm, gradual.Gradual):
    passes = config.total_steps * config.accum_steps
    keys["norm_schedule"] = Norm.create_schedule(config, passes)
  return models.create(
    config.model_name,
    num_classes=num_classes,
    image_size=config.image_size,
    dtype=config.dtype,
    **keys,
  )
