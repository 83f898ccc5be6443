"""The state of training, created from scratch or from a checkpoint."""

from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
import optax

from rescalevit_jax.distributed import sharding
from rescalevit_jax.optim import loss_scale as loss_scale_lib


class TrainState(flax.struct.PyTreeNode):
  """The state that a training step updates."""

  step: Int32[Array, ""]  # Steps done.
  params: Any  # Float32.
  batch_stats: Any  # Running statistics of norms and layers; may be empty.
  opt_state: Any
  # Exponential moving averages of `params` and `batch_stats`.
  ema: dict[str, Any] | None = None
  loss_scale: loss_scale_lib.LossScale | None = None  # In float16.

  @property
  def evaluated(self) -> dict[str, Any]:
    """The collections `params` and `batch_stats` to evaluate."""
    if self.ema is not None:
      return self.ema
    return {"params": self.params, "batch_stats": self.batch_stats}

  def with_variables(self, params: Any, batch_stats: Any) -> "TrainState":
    """Return the state with these weights; restart the EMA from them."""
    state = self.replace(params=params, batch_stats=batch_stats, ema=None)
    if self.ema is None:
      return state
    return state.replace(ema=jax.tree.map(jnp.copy, state.evaluated))

  def to_checkpoint(self) -> dict[str, Any]:
    """Return the trees that a checkpoint saves, by name.

    `variables` are evaluated. `optimizer` has the step, the optimizer's state
    and, with an EMA, the collections that training continues with.
    """
    optimizer = {"step": self.step, "opt_state": self.opt_state}
    if self.ema is not None:
      optimizer |= {"params": self.params, "batch_stats": self.batch_stats}
    items: dict[str, Any] = {
      "variables": self.evaluated,
      "optimizer": optimizer,
    }
    if self.loss_scale is not None:
      items["loss_scale"] = self.loss_scale
    return items

  def from_checkpoint(
    self, items: dict[str, Any], skipped_steps: int
  ) -> "TrainState":
    """Return the state that a checkpoint holds.

    `self` may be abstract. If the run needs a loss scale and the checkpoint has
    none, because of another dtype, a new one is created.
    """
    variables = items["variables"]
    if self.ema is not None:
      variables = {"ema": variables}
    loss_scale = items.get("loss_scale")
    if loss_scale is None and self.loss_scale is not None:
      loss_scale = sharding.put(
        loss_scale_lib.create(skipped_steps), self.step.sharding
      )
    return TrainState(**variables, **items["optimizer"], loss_scale=loss_scale)


def init_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image_size: int,
  seed: int | jax.Array,
  *,
  averages: bool = False,
) -> TrainState:
  """Return the state at step 0 from scratch, with an EMA if `averages`."""
  images = jnp.zeros((1, image_size, image_size, 3))
  variables = model.init(jax.random.key(seed), images, train=False)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables.get("batch_stats", {}),
    opt_state=optimizer.init(variables["params"]),
    loss_scale=(
      loss_scale_lib.create() if model.config.dtype == "float16" else None
    ),
  )
  if averages:
    state = state.replace(ema=jax.tree.map(jnp.copy, state.evaluated))
  return state
