"""Training and evaluation steps: pure functions of state and batch."""

from collections.abc import Callable
import functools
from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt8
import optax

from rescalevit_jax.augment import mixing as mixing_lib
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models.norms import traits
from rescalevit_jax.optim import clipping
from rescalevit_jax.optim import ema as ema_lib
from rescalevit_jax.optim import loss_scale as loss_scale_lib
from rescalevit_jax.optim import sam
from rescalevit_jax.training import train_state


def train_step(
  state: train_state.TrainState,
  images: UInt8[Array, "A B H W 3"],
  labels: Int32[Array, "A B"],
  seed: int | jax.Array,
  *,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
  **options: Any,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """Update the state with the mean gradient of A micro-batches.

  All randomness is a function of (seed, step): a resumed run is the same run.
  Crops depend on the index in the batch, not on `accum_steps`. `options` are of
  `gradient`. `ema_decay` applies if the state has an EMA.

  Returns:
    The updated state and scalars: `loss` (batch mean before the update),
    `grad_norm` (global norm before clipping), and in float16 `loss_scale` and
    `skipped_steps` after the step. In float16, a step with a non-finite
    `grad_norm` is skipped: it updates only the step and the loss scale.
  """
  return update(
    state,
    *gradient(state, images, labels, seed, **options),
    optimizer=optimizer,
    ema_decay=ema_decay,
  )


def gradient(
  state: train_state.TrainState,
  images: UInt8[Array, "A B H W 3"],
  labels: Int32[Array, "A B"],
  seed: int | jax.Array,
  *,
  model: nn.Module,
  augment: preprocess.Augment,
  image_size: int,
  mixing: mixing_lib.Mixing = mixing_lib.NOTHING,
  settled: bool = False,  # True omits calibration; see `traits.Settling`.
  sam_rho: float = 0.0,  # Distance of SAM; 0: the usual gradient.
  freeze: Callable[[Any], Any] = lambda params: params,  # Stops gradients.
  gather: Callable[[Any], Any] = lambda params: params,  # Replicates shards.
  scatter: Callable[[Any], Any] = lambda grads: grads,  # Shards again.
) -> tuple[jax.Array, Any, Any, loss_scale_lib.LossScale | None]:
  """Compute loss, gradient, running statistics and loss scale of a batch.

  With SAM, loss and statistics are from the first of two gradients. Both use
  the same batch, augmentation and dropout.
  """
  keys = random_keys(seed, state.step + 1, labels.shape)
  micro_batches = (images, labels, *keys)

  def micro_step(params, carry, micro_batch):
    batch_stats, loss_scale, sums = carry
    images, labels, crop_keys, dropout_key, mixing_keys = micro_batch
    x = preprocess.prepare_random(crop_keys, images, image_size, augment)
    x, labels = mixing_lib.mix(
      mixing_keys, x, labels, model.config.num_classes, mixing
    )
    (loss, batch_stats), grads, loss_scale = loss_scale_lib.value_and_grad(
      lambda params, *batch: loss_fn(
        freeze(params), *batch, model=model, settled=settled
      ),
      loss_scale,
      params,
      batch_stats,
      x,
      labels,
      dropout_key,
    )
    sums = jax.tree.map(jnp.add, sums, (loss, grads))
    return (batch_stats, loss_scale, sums), None

  def of_batch(params, loss_scale):
    params = gather(params)
    carry = (
      state.batch_stats,
      loss_scale,
      (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
    )
    step = functools.partial(micro_step, params)
    if len(labels) == 1:  # Without a loop, XLA optimizes better.
      carry, _ = step(carry, jax.tree.map(lambda x: x[0], micro_batches))
    else:
      carry, _ = jax.lax.scan(step, carry, micro_batches)
    batch_stats, loss_scale, sums = carry
    loss, grads = jax.tree.map(lambda x: x / len(labels), sums)
    return loss, scatter(grads), batch_stats, loss_scale

  loss, grads, batch_stats, loss_scale = of_batch(
    state.params, state.loss_scale
  )
  if sam_rho:
    ascended = sam.ascend(state.params, grads, sam_rho)
    finite = jnp.isfinite(clipping.global_norm(grads))
    _, grads, _, second_scale = of_batch(ascended, loss_scale)
    # From weights that are not finite, each micro-batch would lower the scale.
    loss_scale = jax.tree.map(
      functools.partial(jnp.where, finite), second_scale, loss_scale
    )
  return loss, grads, batch_stats, loss_scale


def random_keys(
  seed: int | jax.Array, step: int | jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return a step's keys: of crops [A, B], dropout [A] and mixing [A, B]."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  crop_key, dropout_key = jax.random.split(key)
  # jax.random.split folds in 0 and 1, so 2 gives an independent key.
  mixing_key = jax.random.fold_in(key, 2)
  return (
    jax.random.split(crop_key, shape),
    jax.random.split(dropout_key, shape[0]),
    jax.random.split(mixing_key, shape),
  )


def loss_fn(
  params: Any,
  batch_stats: Any,
  images: Float32[Array, "B S S 3"],
  labels: Int32[Array, " B"] | Float32[Array, "B C"],
  dropout_key: jax.Array,
  *,
  model: nn.Module,
  settled: bool = False,
) -> tuple[Float32[Array, ""], Any]:
  """Compute the mean cross-entropy in training mode, with terms of norms.

  Images are in [-1, 1]. Labels are class indices, or target probabilities.

  Returns:
    The loss and the running statistics after the forward pass.
  """
  mutable = ["batch_stats", traits.LOSSES]
  if settled:
    mutable.append(traits.SETTLED)
  logits, new = model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=mutable,
    rngs={"dropout": dropout_key},
  )
  if jnp.issubdtype(labels.dtype, jnp.integer):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.softmax_cross_entropy(logits, labels)
  loss = losses.mean()
  for term in jax.tree.leaves(new.get(traits.LOSSES, {})):
    loss += term
  return loss, new.get("batch_stats", {})


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
  """Apply a gradient; return the results of `train_step`.

  The trainer writes each scalar of the returned metrics to `metrics.jsonl`.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = train_state.TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  if state.ema is not None:
    # Unlike the step, the optimizer does not count skipped steps.
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
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
  metrics |= {
    "loss_scale": cast(jax.Array, loss_scale.scale),  # Flax declares a float.
    "skipped_steps": skipped_steps,
  }
  return new, metrics


def eval_step(
  params: Any,
  batch_stats: Any,
  images: UInt8[Array, "B H W 3"],
  labels: Int32[Array, " B"],
  mask: Bool[Array, " B"],
  *,
  model: nn.Module,
  image_size: int,
) -> dict[str, jax.Array]:
  """Compute sums over one batch of a split; `mask` is False for padding.

  Returns:
    `loss` (float32) and `correct` (int32), summed over the examples; `logits`
    [B, C] and `labels` [B], padding included.
  """
  x = preprocess.prepare(images, image_size)
  variables = {"params": params, "batch_stats": batch_stats}
  logits = cast(jax.Array, model.apply(variables, x, train=False))
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return {
    "loss": jnp.where(mask, loss, 0.0).sum(),
    "correct": (mask & (logits.argmax(-1) == labels)).sum(),
    "logits": logits,
    "labels": labels,
  }


def feature_step(
  params: Any,
  batch_stats: Any,
  images: UInt8[Array, "B H W 3"],
  labels: Int32[Array, " B"],
  mask: Bool[Array, " B"],
  *,
  model: nn.Module,
  image_size: int,
) -> dict[str, jax.Array]:
  """Compute the inputs of the model's head for one batch; see `eval_step`.

  Returns:
    `features` [B, D] and `labels` [B], padding included.
  """
  del mask
  features = []

  def intercept(method, args, kwargs, context):
    if context.module.path == ("head",):
      features.append(args[0])
    return method(*args, **kwargs)

  x = preprocess.prepare(images, image_size)
  with nn.intercept_methods(intercept):
    model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
  return {"features": features[0], "labels": labels}
