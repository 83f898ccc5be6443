"""train_step and eval_step: pure functions of state and batch."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from rescalevit_jax.augment import mixing as mixing_lib
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import base
from rescalevit_jax.optim import clipping
from rescalevit_jax.optim import ema as ema_lib
from rescalevit_jax.optim import loss_scale as loss_scale_lib
from rescalevit_jax.training import train_state


def train_step(
  state: train_state.TrainState,
  images: jax.Array,
  labels: jax.Array,
  seed: int | jax.Array,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  augment: preprocess.Augment,
  image_size: int,
  mixing: mixing_lib.Mixing = mixing_lib.NOTHING,
  ema_decay: float = 0.0,
  settled: bool = False,
  gather: Callable[[Any], Any] = lambda params: params,
  scatter: Callable[[Any], Any] = lambda grads: grads,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """One update.

  All randomness is a function of (seed, step), so that a resumed run is the
  same run; a crop depends on its place in the batch, not on `accum_steps`.

  Args:
    state: the state before the update.
    images: [A, B, H, W, 3] uint8, the batch as A micro-batches, whose gradients
      are averaged.
    labels: [A, B] int32.
    seed: of the run.
    model: a `VisionTransformer`.
    optimizer: of the parameters.
    augment: what happens to training images.
    image_size: edge of the model's input, in pixels.
    mixing: what happens to labels, and to pairs of images of a micro-batch.
    ema_decay: of the averages, if the state has them.
    settled: whether the first `Norm.SETTLES_AFTER` passes are over. If so, the
      program omits calibration.
    gather: brings parameters, of which a device may hold a part, to all.
    scatter: leaves each device its part of a gradient.

  Returns:
    The state after the update, and scalars: `loss` (mean over the batch, before
    the update) and `grad_norm` (global norm before clipping). In float16 also
    `loss_scale` and `skipped_steps`, after the step. A step whose `grad_norm`
    is not finite is skipped: it changes the step, the loss scale and nothing
    else.
  """
  loss, grads, batch_stats, loss_scale = gradient(
    state,
    images,
    labels,
    seed,
    model=model,
    augment=augment,
    image_size=image_size,
    mixing=mixing,
    settled=settled,
    gather=gather,
    scatter=scatter,
  )
  return update(
    state,
    loss,
    grads,
    batch_stats,
    loss_scale,
    optimizer=optimizer,
    ema_decay=ema_decay,
  )


def gradient(
  state: train_state.TrainState,
  images: jax.Array,
  labels: jax.Array,
  seed: int | jax.Array,
  *,
  model: nn.Module,
  augment: preprocess.Augment,
  image_size: int,
  mixing: mixing_lib.Mixing = mixing_lib.NOTHING,
  settled: bool = False,
  gather: Callable[[Any], Any] = lambda params: params,
  scatter: Callable[[Any], Any] = lambda grads: grads,
) -> tuple[jax.Array, Any, Any, loss_scale_lib.LossScale | None]:
  """Returns loss, gradient, new statistics and loss scale; see `train_step`."""
  crop_keys, dropout_keys, mixing_keys = random_keys(
    seed, state.step + 1, labels.shape
  )
  params = gather(state.params)

  def micro_step(carry, micro_batch):
    batch_stats, loss_scale, sums = carry
    images, labels, crop_keys, mixing_keys, dropout_key = micro_batch
    x = preprocess.prepare_random(crop_keys, images, image_size, augment)
    x, labels = mixing_lib.mix(
      mixing_keys, x, labels, model.num_classes, mixing
    )
    (loss, batch_stats), grads, loss_scale = loss_scale_lib.value_and_grad(
      functools.partial(loss_fn, model=model, settled=settled),
      loss_scale,
      params,
      batch_stats,
      x,
      labels,
      dropout_key,
    )
    sums = jax.tree.map(jnp.add, sums, (loss, grads))
    return (batch_stats, loss_scale, sums), None

  carry = (
    state.batch_stats,
    state.loss_scale,
    (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
  )
  micro_batches = (images, labels, crop_keys, mixing_keys, dropout_keys)
  if len(labels) == 1:  # No loop: the compiler sees one straight step.
    carry, _ = micro_step(carry, jax.tree.map(lambda x: x[0], micro_batches))
  else:
    carry, _ = jax.lax.scan(micro_step, carry, micro_batches)
  batch_stats, loss_scale, sums = carry
  loss, grads = jax.tree.map(lambda x: x / len(labels), sums)
  return loss, scatter(grads), batch_stats, loss_scale


def random_keys(
  seed: int | jax.Array, step: int | jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a step's keys: of crops [A, B], dropout [A] and mixing [A, B]."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  crop_key, dropout_key = jax.random.split(key)
  # Splitting is folding in 0, 1, …: another number gives another key.
  mixing_key = jax.random.fold_in(key, 2)
  return (
    jax.random.split(crop_key, shape),
    jax.random.split(dropout_key, shape[0]),
    jax.random.split(mixing_key, shape),
  )


def loss_fn(
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  labels: jax.Array,
  dropout_key: jax.Array,
  *,
  model: nn.Module,
  settled: bool = False,
) -> tuple[jax.Array, Any]:
  """Mean cross-entropy in training mode.

  Args:
    params: the parameters.
    batch_stats: the statistics before the pass.
    images: [B, S, S, 3] float32 in [-1, 1].
    labels: [B] int32, or what the model ought to say, [B, C] float32.
    dropout_key: a PRNG key.
    model: a `VisionTransformer`.
    settled: whether the norm has had its `SETTLES_AFTER` passes before.

  Returns:
    The loss, [] float32, and the statistics after the pass.
  """
  logits, new = model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=["batch_stats", base.SETTLED] if settled else ["batch_stats"],
    rngs={"dropout": dropout_key},
  )
  if jnp.issubdtype(labels.dtype, jnp.integer):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.softmax_cross_entropy(logits, labels)
  return losses.mean(), new.get("batch_stats", {})


def update(
  state: train_state.TrainState,
  loss: jax.Array,
  grads: Any,
  batch_stats: Any,
  loss_scale: loss_scale_lib.LossScale | None = None,
  *,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """Applies a gradient; see `train_step` for what it returns."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = train_state.TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  if state.ema is not None:
    count = new.step
    if loss_scale is not None:
      count -= loss_scale.skipped_steps
    ema = ema_lib.update(state.ema, new.evaluated, count, ema_decay)
    new = new.replace(ema=ema)
  metrics = {"loss": loss, "grad_norm": clipping.global_norm(grads)}
  if loss_scale is None:
    return new, metrics
  finite = jnp.isfinite(metrics["grad_norm"])
  skipped_steps = loss_scale.skipped_steps + ~finite
  loss_scale = loss_scale.replace(skipped_steps=skipped_steps)
  new = jax.tree.map(
    functools.partial(jnp.where, finite),
    new.replace(loss_scale=loss_scale),
    state.replace(step=new.step, loss_scale=loss_scale),
  )
  metrics |= {"loss_scale": loss_scale.scale, "skipped_steps": skipped_steps}
  return new, metrics


def eval_step(
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  *,
  model: nn.Module,
  image_size: int,
) -> dict[str, jax.Array]:
  """Sums over one batch of a split.

  Args:
    params: the parameters.
    batch_stats: the statistics.
    images: [B, H, W, 3] uint8.
    labels: [B] int32.
    mask: [B] bool, False where the batch is only filled up.
    model: a `VisionTransformer`.
    image_size: edge of the model's input, in pixels.

  Returns:
    `loss` ([] float32) and `correct` ([] int32), summed over the examples.
  """
  x = preprocess.prepare(images, image_size)
  logits = model.apply(
    {"params": params, "batch_stats": batch_stats}, x, train=False
  )
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return {
    "loss": jnp.where(mask, loss, 0.0).sum(),
    "correct": (mask & (logits.argmax(-1) == labels)).sum(),
  }
