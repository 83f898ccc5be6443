"""Norms that start from the statistics of the first training batches.

A calibration is made once, before the first step, of the batches of steps 1 to
8 with their crops, mixing and dropout: a function of the seed and the data
alone. A run that goes on has its result in the checkpoint.
"""

from collections.abc import Iterable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.augment import mixing as mixing_lib
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import pointwise
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step

BATCHES = 8  # As many as Rescale's.

_COLLECTIONS = ("params", "batch_stats", pointwise.CALIBRATION)


def calibrate(
  state: train_state.TrainState,
  batches: Iterable[tuple[jax.Array, jax.Array]],
  seed: int | jax.Array,
  *,
  model: nn.Module,
  augment: preprocess.Augment,
  mixing: mixing_lib.Mixing,
  image_size: int,
  places: train_state.TrainState,
) -> train_state.TrainState:
  """Returns the state with the norms calibrated.

  Args:
    state: at step 0.
    batches: of the steps from 1 on; see `step.train_step` for their shapes.
    seed: of the run.
    model: a `VisionTransformer`.
    augment: what happens to training images.
    mixing: what happens to pairs of them.
    image_size: edge of the model's input, in pixels.
    places: where the arrays of the state lie.
  """
  params, batch_stats = state.params, state.batch_stats
  passes = functools.partial(
    measure,
    model=model,
    augment=augment,
    mixing=mixing,
    image_size=image_size,
  )
  everywhere = places.step
  passes = jax.jit(
    passes, out_shardings=(places.params, places.batch_stats, everywhere)
  )
  measured = None
  for i, (images, labels) in enumerate(batches):
    if measured is None:
      measured = _nothing(model, params, batch_stats, image_size)
    params, batch_stats, measured = passes(
      params, batch_stats, measured, images, labels, seed, i + 1
    )
  return state.replace(params=params, batch_stats=batch_stats)


def measure(
  params: Any,
  batch_stats: Any,
  measured: Any,
  images: jax.Array,
  labels: jax.Array,
  seed: int | jax.Array,
  step: int | jax.Array,
  *,
  model: nn.Module,
  augment: preprocess.Augment,
  mixing: mixing_lib.Mixing,
  image_size: int,
) -> tuple[Any, Any, Any]:
  """One batch's part in a calibration: a pass of each micro-batch.

  Args:
    params: the parameters.
    batch_stats: the statistics.
    measured: the collection `pointwise.CALIBRATION` after the batches before.
    images: [A, B, H, W, 3] uint8.
    labels: [A, B] int32.
    seed: of the run.
    step: whose batch this is.
    model: a `VisionTransformer`.
    augment: what happens to training images.
    mixing: what happens to pairs of them.
    image_size: edge of the model's input, in pixels.

  Returns:
    The first three with this batch taken into account.
  """
  crop_keys, dropout_keys, mixing_keys = train_step.random_keys(
    seed, step, images.shape[:2]
  )

  def micro_step(collections, micro_batch):
    images, labels, crop_keys, mixing_keys, dropout_key = micro_batch
    x = preprocess.prepare_random(crop_keys, images, image_size, augment)
    x, _ = mixing_lib.mix(mixing_keys, x, labels, model.num_classes, mixing)
    new = _forward(model, collections, x, dropout_key)
    return tuple(new.get(name, {}) for name in _COLLECTIONS), None

  collections = (params, batch_stats, measured)
  micro_batches = (images, labels, crop_keys, mixing_keys, dropout_keys)
  return jax.lax.scan(micro_step, collections, micro_batches)[0]


def _nothing(model, params, batch_stats, image_size):
  """Returns the collection of what is measured, before anything is."""
  x = jnp.zeros((1, image_size, image_size, 3))
  shapes = jax.eval_shape(
    functools.partial(_forward, model),
    (params, batch_stats, {}),
    x,
    jax.random.key(0),
  )
  shapes = shapes.get(pointwise.CALIBRATION, {})
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _forward(model, collections, x, dropout_key):
  """Returns the collections after a pass of x [B, S, S, 3], by name."""
  return model.apply(
    dict(zip(_COLLECTIONS, collections, strict=True)),
    x,
    train=True,
    mutable=list(_COLLECTIONS),
    rngs={"dropout": dropout_key},
  )[1]
