"""Bounded scalar functions, by name."""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


@dataclasses.dataclass(frozen=True)
class Function:
  """A function with values in [-1, 1]."""

  apply: Callable[[Float[Array, "..."]], Float[Array, "..."]]
  # |f| above which the slope is below a tenth of its maximum.
  saturated: float


FUNCTIONS = {
  # The slope is 1 - tanh^2.
  "tanh": Function(jnp.tanh, 0.9**0.5),
  # The slope at u is exp(-u^2) times the maximum.
  "erf": Function(jax.lax.erf, math.erf(math.log(10) ** 0.5)),
  # The slope is (1 + u^2)^(-3/2).
  "isru": Function(
    lambda u: u * jax.lax.rsqrt(1 + u * u), (1 - 10 ** (-2 / 3)) ** 0.5
  ),
  # The slope is 0 where |f| = 1.
  "clip": Function(
    lambda u: jnp.clip(u, -1, 1), float(np.nextafter(np.float32(1), 0))
  ),
  # The slope is 1 / (1 + u^2) times the maximum.
  "arctan": Function(
    lambda u: 2 / math.pi * jnp.arctan(u), 2 / math.pi * math.atan(3)
  ),
  # The slope is (1 + |u|)^(-2).
  "softsign": Function(lambda u: u / (1 + jnp.abs(u)), 1 - 10**-0.5),
}
