"""Fade: a LayerNorm that becomes a linear map or a tanh during training.

After Heimersheim 2024 (arXiv:2409.13710) and Baroni et al. 2025 ("Transformers
Don't Need LayerNorm at Inference Time"), who remove GPT-2's norms one by one
while they fine-tune. LayerNorm is linear except for 1 / sigma, so a constant
sigma leaves a linear map. They replace sigma at once. Here the change is
gradual, and may end as a tanh, as in DyT (arXiv:2503.10622).
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from rescalevit_jax.models.norms import functions
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import traits
from rescalevit_jax.runtime import accelerator


@dataclasses.dataclass(frozen=True)
class Schedule(gradual.Schedule):
  """The schedule, and the function at its end."""

  separate_cls: bool  # True if class token and patches have separate scales.
  alpha: float = 0.0  # Of the final tanh; 0: a linear map.


class Fade(
  gradual.Gradual,
  layer_norm.Affine,
  traits.Foldable,
  traits.Saturating,
):
  """LayerNorm whose sigma fades to a constant during fine-tuning. Ours.

    z = (x - mean) / (sigma^(1 - t) * frozen^t)
    y = scale * tanh(t * alpha * z) / (t * alpha) + bias

  `mean` and `sigma` are each token's own. `frozen` is the running geometric
  mean of sigma over the class tokens or the patches at a site. t rises from 0,
  which is LayerNorm, to 1, when `frozen` becomes constant. The result is a
  linear map if alpha is 0, where tanh(az) / a is replaced by z. Otherwise it is
  DyT of x - mean with a constant alpha. The parameters are LayerNorm's, so any
  LayerNorm checkpoint loads. Only training passes change t.
  """

  schedule: Schedule | None = None

  COLOR: ClassVar[str] = "#777777"
  CENTERED: ClassVar[bool] = True
  FUNCTION: ClassVar[functions.Function] = functions.FUNCTIONS["tanh"]

  def setup(self):
    super().setup()
    alpha = 0.0 if self.schedule is None else self.schedule.alpha
    self.log_sigma = self.variable("batch_stats", "log_sigma", jnp.zeros, 2)
    self.alpha = self.variable("batch_stats", "alpha", jnp.float32, alpha)

  def normalize(self, x, train):
    log_sigma, faded = self.log_sigma.value, self.faded.value
    share = faded / gradual.FULL
    patches = jnp.broadcast_to(log_sigma[1:], x.shape[1] - 1)
    frozen = jnp.concatenate([log_sigma[:1], patches])[:, None]
    y, log_own = normalize(x, frozen, share, self.options.epsilon)
    if train and not self.is_initializing():
      passes = self.count.value + 1
      if self.schedule is None or self.schedule.separate_cls:
        mean = jnp.stack([log_own[:, 0].mean(), log_own[:, 1:].mean()])
      else:
        mean = jnp.broadcast_to(log_own.mean(), 2)
      updated = gradual.update_mean(log_sigma, mean, passes)
      self.log_sigma.value = jnp.where(faded < gradual.FULL, updated, log_sigma)
      self.count_pass()
      if self.schedule is not None:
        # This replaces the alpha of a loaded file.
        self.alpha.value = jnp.float32(self.schedule.alpha)
    if self.schedule is None:
      return self.scaled_tanh(y, share * self.alpha.value)
    if self.schedule.alpha > 0:
      y = self.scaled_tanh(y, share * self.schedule.alpha)
    return y

  def scaled_tanh(self, y, alpha):
    """Return tanh(alpha * y) / alpha, or y where alpha is 0."""
    curved = self.function(alpha * y) / jnp.where(alpha > 0, alpha, 1.0)
    return jnp.where(alpha > 0, curved, y)

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    of_cls, of_patches = batch_stats["log_sigma"]
    linear = batch_stats["faded"] == gradual.FULL and batch_stats["alpha"] == 0
    if not linear or of_cls != of_patches:
      raise ValueError(
        "Fade folds only after it has faded to a linear map, with one scale for"
        " class token and patches; take the latest checkpoint of a finished run"
        " with fade.alpha=0 and fade.separate_cls=False"
      )
    return params["scale"] * np.exp(-of_patches), params["bias"]

  @staticmethod
  def create_schedule(config, passes):
    keys = config.fade
    return Schedule(
      keys.begin * passes,
      keys.end * passes,
      keys.site_fraction,
      keys.separate_cls,
      keys.alpha,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: Float[Array, "B N D"],
  log_frozen: Float[Array, "N 1"],
  share: Float[Array, ""],
  epsilon: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N 1"]]:
  """Return (x - mean) / (sigma^(1 - share) * frozen^share) and log sigma.

  The result is LayerNorm's if share is 0. If share is 1, only the mean, a
  linear function, depends on the token. No gradient flows through `log_frozen`,
  `share` and the returned log sigma, which are statistics.
  """
  return _forward(x, log_frozen, share, epsilon)[0]


def _forward(x, log_frozen, share, epsilon):
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True) + epsilon
  own, log_own = jax.lax.rsqrt(var), 0.5 * jnp.log(var)
  # Exactly LayerNorm's at 0 and exactly the frozen one at 1.
  between = own * jnp.exp(share * (log_own - log_frozen))
  scale = jnp.where(share < 1, between, jnp.exp(-log_frozen))
  # The barrier has the same purpose as in `ops.normalization`.
  kept = jax.lax.optimization_barrier((mean, own, scale))
  if accelerator.platform() == "cpu":
    mean, own, scale = kept
  return ((x - mean) * scale, log_own), (x, *kept, share)


def _backward(epsilon, residuals, gradients):
  del epsilon
  # As in `ops.normalization`, with a scale that depends on sigma^(share - 1).
  # With y the normalized x,
  #   dx = scale * (dy - mean(dy) - (1 - share) * y * mean(dy * y)).
  x, mean, own, scale, share = residuals
  dy, _ = gradients
  y = (x - mean) * own
  dy_mean = dy.mean(-1, keepdims=True)
  dy_y_mean = (1 - share) * (dy * y).mean(-1, keepdims=True)
  dx = scale * (dy - dy_mean - y * dy_y_mean)
  return dx, jnp.zeros(x.shape[1:2] + (1,)), jnp.zeros(())


normalize.defvjp(_forward, _backward)
