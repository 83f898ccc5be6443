"""Normalization by mean and variance, with a hand-written gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rescalevit_jax.runtime import accelerator

EPSILON = 1e-6


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def normalize(
  x: Float[Array, "..."],
  axes: tuple[int, ...],
  centered: bool = True,
  epsilon: float = EPSILON,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
  """Return x with mean 0 and variance 1 over axes, its mean and its variance.

  The returned mean and biased variance are statistics: no gradient flows
  through them. Unless `centered`, the mean counts as 0, and the variance is the
  mean square.
  """
  return _forward(x, axes, centered, epsilon)[0]


def _forward(x, axes, centered, epsilon):
  if centered:
    mean = x.mean(axes, keepdims=True)
    var = jnp.square(x - mean).mean(axes, keepdims=True)
  else:
    var = jnp.square(x).mean(axes, keepdims=True)
    mean = jnp.zeros_like(var)
  scale = jax.lax.rsqrt(var + epsilon)
  # Without the barrier XLA recomputes both at each use: on a CPU for each
  # element, and on a GPU in the backward pass, which then writes a float32
  # array of the size of x for the gradient of the norm's scale.
  kept = jax.lax.optimization_barrier((mean, scale))
  if accelerator.platform() == "cpu":
    mean, scale = kept
  return ((x - mean) * scale, mean, var), (x, *kept)


def _backward(axes, centered, epsilon, residuals, gradients):
  del epsilon
  # Ioffe & Szegedy 2015, section 3, as one formula: with y the result,
  #   dx = scale * (dy - mean(dy) - y * mean(dy * y)),
  # without mean(dy) if x is not centered. XLA's own gradient recomputes the
  # gradient of the residual stream in each term.
  x, mean, scale = residuals
  dy, _, _ = gradients
  y = (x - mean) * scale
  dy_y_mean = (dy * y).mean(axes, keepdims=True)
  if centered:
    dy_mean = dy.mean(axes, keepdims=True)
    return (scale * (dy - dy_mean - y * dy_y_mean),)
  return (scale * (dy - y * dy_y_mean),)


normalize.defvjp(_forward, _backward)
