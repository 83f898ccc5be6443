"""LayerNorm that fades into a linear map or a tanh: when, and how far along.

After Heimersheim 2024 (arXiv:2409.13710) and Baroni et al. 2025 ("Transformers
Don't Need LayerNorm at Inference Time"), who take GPT-2's norms out one by one
while fine-tuning: LayerNorm but for 1 / sigma is linear, so that a sigma which
is no longer the token's own leaves a linear map. They replace it at once; here
it goes over slowly, if asked for to a tanh, as in DyT (arXiv:2503.10622).

Shapes: B images, N tokens (the class token first), D channels.
"""

import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from rescalevit_jax.models.ops import normalization
from rescalevit_jax.runtime import accelerator

# How far a place has faded is counted in parts, since an average of the weights
# takes integers as they are: it ends at `FULL` exactly.
FULL = 2**16

# Statistics of a place: its training passes, and how far it has faded.
COUNT, FADED = "count", "faded"
_MEMORY = 100  # Passes that the running statistics look back.


@dataclasses.dataclass(frozen=True)
class Ramp:
  """When one place fades, in training passes (micro-batches).

  Attributes:
    begin: passes after which it begins.
    end: passes after which it is done.
    separate_cls: whether class token and patches have a scale of their own.
    alpha: of the tanh at the end; 0: a linear map.
  """

  begin: float
  end: float
  separate_cls: bool
  alpha: float = 0.0

  def faded(self, passes: jax.Array) -> jax.Array:
    """Returns how far it is after so many passes, [] int32 in [0, FULL]."""
    share = (passes - self.begin) / max(self.end - self.begin, 1.0)
    share = jnp.where(passes >= self.end, 1.0, jnp.clip(share, 0.0, 1.0))
    return jnp.round(FULL * share).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When the places fade: the first one first, the final norm last.

  Attributes:
    begin: training passes after which the first place begins.
    end: training passes after which the last one is done.
    site_fraction: fraction of the time between that one site takes, in
      (0, 1]; 1: all sites at once.
    separate_cls: whether class token and patches have scales of their own.
    alpha: of the tanh that places end as; 0: linear maps.
  """

  begin: float
  end: float
  site_fraction: float
  separate_cls: bool
  alpha: float = 0.0

  def ramp(self, place: int, places: int) -> Ramp:
    """Returns when a place fades, of those from 0 to places - 1."""
    length = self.site_fraction * (self.end - self.begin)
    delay = (self.end - self.begin - length) * place / max(1, places - 1)
    begin = self.begin + delay
    return Ramp(begin, begin + length, self.separate_cls, self.alpha)


@jax.custom_vjp
def normalize(
  x: jax.Array, log_frozen: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns x about each token's mean over sigma^(1 - share) frozen^share.

  With share 0 that is LayerNorm's; with share 1 nothing but the mean, a linear
  function, depends on the token.

  Args:
    x: [B, N, D] float32.
    log_frozen: logarithm of the frozen sigma, [N, 1]; a statistic, through
      which no gradient goes.
    share: [] float32 in [0, 1]; likewise.

  Returns:
    The result [B, N, D] and the logarithm of each token's own sigma [B, N, 1],
    a statistic.
  """
  return _forward(x, log_frozen, share)[0]


def _forward(x, log_frozen, share):
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True) + normalization.EPSILON
  own, log_own = jax.lax.rsqrt(var), 0.5 * jnp.log(var)
  # Exactly LayerNorm's at 0, exactly the frozen one at 1.
  between = own * jnp.exp(share * (log_own - log_frozen))
  scale = jnp.where(share < 1, between, jnp.exp(-log_frozen))
  kept = jax.lax.optimization_barrier(
    (mean, own, scale)
  )  # As in `normalization`.
  if accelerator.platform() == "cpu":
    mean, own, scale = kept
  return ((x - mean) * scale, log_own), (x, *kept, share)


def _backward(residuals, gradients):
  # As in `normalization`, with a scale that depends on sigma^(share - 1): with
  # y the normalized x,
  #   dx = scale * (dy - mean(dy) - (1 - share) * y * mean(dy * y)).
  x, mean, own, scale, share = residuals
  dy, _ = gradients
  y = (x - mean) * own
  dy_mean = dy.mean(-1, keepdims=True)
  dy_y_mean = (1 - share) * (dy * y).mean(-1, keepdims=True)
  dx = scale * (dy - dy_mean - y * dy_y_mean)
  return dx, jnp.zeros(x.shape[1:2] + (1,)), jnp.zeros(())


normalize.defvjp(_forward, _backward)


def reset_counters(batch_stats: Any) -> Any:
  """Returns the statistics with no passes counted: those of another run were.

  So the mean of sigma begins anew, too, but at places that are done. How far a
  place has faded stays, and so do the statistics of other norms.
  """
  flat = traverse_util.flatten_dict(batch_stats)
  for *place, name in list(flat):
    if name == FADED:
      flat[*place, COUNT] = 0 * flat[*place, COUNT]
  return traverse_util.unflatten_dict(flat)


def by_token(kinds: jax.Array, tokens: int) -> jax.Array:
  """Returns numbers for class token and patches, [2], as those of N, [N, 1]."""
  patches = jnp.broadcast_to(kinds[1:], tokens - 1)
  return jnp.concatenate([kinds[:1], patches])[:, None]


def update_running_mean(
  log_frozen: jax.Array,
  log_own: jax.Array,
  passes: jax.Array,
  separate_cls: bool,
) -> jax.Array:
  """Moves the running means towards those of a batch.

  Args:
    log_frozen: of class token and patches, [2].
    log_own: of the batch's tokens, [B, N, 1].
    passes: [] int32, batches with this one: up to 100 the mean is over all.
    separate_cls: whether the two differ; else both are the mean over tokens.
  """
  if separate_cls:
    found = jnp.stack([log_own[:, 0].mean(), log_own[:, 1:].mean()])
  else:
    found = jnp.broadcast_to(log_own.mean(), 2)
  rate = jnp.maximum(1 / passes, 1 / _MEMORY)
  return log_frozen + rate * (found - log_frozen)
