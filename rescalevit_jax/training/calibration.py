"""Calibration of norms on the first training batches.

Runs once, before the first step, on the batches of steps 1 to 8 with their
crops, mixing and dropout. The result depends on seed and data only; checkpoints
contain it.
"""

from collections.abc import Iterable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8
import numpy as np

from rescalevit_jax.augment import mixing as mixing_lib
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models.norms import traits
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step

NUM_BATCHES = 8  # Like Rescale.

_COLLECTIONS = ("params", "batch_stats", traits.CALIBRATION)


def calibrate(
  state: train_state.TrainState,
  batches: Iterable[tuple[jax.Array, jax.Array]],
  seed: int | np.integer | jax.Array,
  *,
  shardings: train_state.TrainState,
  model: nn.Module,
  image_size: int,
  **options: Any,
) -> train_state.TrainState:
  """Return the state with norms calibrated on the first training batches.

  `options` are the other arguments of `measure`.
  """
  params, batch_stats = state.params, state.batch_stats
  passes = jax.jit(
    functools.partial(measure, model=model, image_size=image_size, **options),
    out_shardings=(shardings.params, shardings.batch_stats, shardings.step),
  )
  measured = _initial(model, params, batch_stats, image_size)
  for step, (images, labels) in enumerate(batches, start=1):
    params, batch_stats, measured = passes(
      params, batch_stats, measured, images, labels, seed, step
    )
  return state.with_variables(params, batch_stats)


def measure(
  params: Any,
  batch_stats: Any,
  measured: Any,
  images: UInt8[Array, "A B H W 3"],
  labels: Int32[Array, "A B"],
  seed: int | jax.Array,
  step: int | jax.Array,
  *,
  model: nn.Module,
  augment: preprocess.Augment,
  mixing: mixing_lib.Mixing,
  image_size: int,
) -> tuple[Any, Any, Any]:
  """Return the first three arguments after an update with a step's batch.

  `measured` is the collection `traits.CALIBRATION` of earlier batches.
  """
  keys = train_step.random_keys(seed, step, labels.shape)

  def micro_step(collections, micro_batch):
    images, labels, crop_keys, dropout_key, mixing_keys = micro_batch
    x = preprocess.prepare_random(crop_keys, images, image_size, augment)
    x, _ = mixing_lib.mix(
      mixing_keys, x, labels, model.config.num_classes, mixing
    )
    new = _forward(model, collections, x, dropout_key)
    return tuple(new.get(name, {}) for name in _COLLECTIONS), None

  collections = (params, batch_stats, measured)
  micro_batches = (images, labels, *keys)
  return jax.lax.scan(micro_step, collections, micro_batches)[0]


def _initial(model, params, batch_stats, image_size):
  """Return the calibration collection before the first batch."""
  x = jnp.zeros((1, image_size, image_size, 3))
  shapes = jax.eval_shape(
    functools.partial(_forward, model),
    (params, batch_stats, {}),
    x,
    jax.random.key(0),
  )
  shapes = shapes.get(traits.CALIBRATION, {})
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _forward(model, collections, x, dropout_key):
  """Return the collections after a forward pass of x, by name."""
  return model.apply(
    dict(zip(_COLLECTIONS, collections, strict=True)),
    x,
    train=True,
    mutable=list(_COLLECTIONS),
    rngs={"dropout": dropout_key},
  )[1]
