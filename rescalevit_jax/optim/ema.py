"""Exponential moving average (EMA) of the weights over the steps."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped


def update(
  average: PyTree[Shaped[Array, "..."]],
  latest: PyTree[Shaped[Array, "..."]],
  step: Int[Array, ""],
  decay: float,
) -> PyTree[Shaped[Array, "..."]]:
  """Return the moving average after one more step.

  The bias-corrected moving average of Kingma & Ba 2015 (arXiv:1412.6980),
  section 3, as a recursion. After step t,

    average += (1 - decay) / (1 - decay^t) * (latest - average)

  The first step, t = 1, returns the latest values. Integers are counters and
  are copied.
  """
  # Not 1 - decay^t, which loses most digits in float32.
  weight = (1 - decay) / -jnp.expm1(step * math.log(decay))

  def move(average, latest):
    if jnp.issubdtype(latest.dtype, jnp.integer):
      return latest
    return average + weight * (latest - average)

  return jax.tree.map(move, average, latest)
