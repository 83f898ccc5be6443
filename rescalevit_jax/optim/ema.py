"""Weights averaged over the steps: an exponential moving average, EMA."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def update(average: Any, latest: Any, step: jax.Array, decay: float) -> Any:
  """Moves an average towards the latest values.

  The bias-corrected moving average of Kingma & Ba 2015 (arXiv:1412.6980),
  section 3, as a recursion. After step t,

    average += (1 - decay) / (1 - decay^t) * (latest - average)

  so that the first step takes the latest values, and where the average began
  does not matter.

  Args:
    average: a tree of arrays.
    latest: the same of their values now; integers, which count, are taken as
      they are.
    step: [] int32, t.
    decay: in (0, 1).

  Returns:
    The tree of averages after the step.
  """
  # Not 1 - decay^t, which float32 would round to a few digits.
  share = (1 - decay) / -jnp.expm1(step * math.log(decay))

  def move(average, latest):
    if jnp.issubdtype(latest.dtype, jnp.integer):
      return latest
    return average + share * (latest - average)

  return jax.tree.map(move, average, latest)
