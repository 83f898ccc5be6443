"""What norms divide by, with the gradient written out."""

import functools

import jax
import jax.numpy as jnp

from rescalevit_jax.runtime import accelerator

EPSILON = 1e-6


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalize(
  x: jax.Array, axes: tuple[int, ...], centered: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns x with mean 0 and variance 1 over axes, and both as they were.

  The mean and the biased variance are statistics: no gradient goes through
  them as results.

  Args:
    x: of any shape, float32.
    axes: to normalize over.
    centered: whether the mean is taken away; without, it counts as 0, and the
      variance is the mean square.
  """
  return _forward(x, axes, centered)[0]


def _forward(x, axes, centered):
  if centered:
    mean = x.mean(axes, keepdims=True)
    var = jnp.square(x - mean).mean(axes, keepdims=True)
  else:
    var = jnp.square(x).mean(axes, keepdims=True)
    mean = jnp.zeros_like(var)
  scale = jax.lax.rsqrt(var + EPSILON)
  # Without the barrier XLA would compute both anew wherever they are used: on a
  # CPU for each element, on a GPU in the backward pass, which then writes a
  # float32 array of the size of x for the gradient of the norm's scale.
  kept = jax.lax.optimization_barrier((mean, scale))
  if accelerator.platform() == "cpu":
    mean, scale = kept
  return ((x - mean) * scale, mean, var), (x, *kept)


def _backward(axes, centered, residuals, gradients):
  # Ioffe & Szegedy 2015, section 3, put together: with y the result,
  #   dx = scale * (dy - mean(dy) - y * mean(dy * y)),
  # without mean(dy) where no mean is taken away. The compiler, left to itself,
  # computes the residual stream's gradient anew in each of the parts.
  x, mean, scale = residuals
  dy, _, _ = gradients
  y = (x - mean) * scale
  dy_y_mean = (dy * y).mean(axes, keepdims=True)
  if centered:
    dy_mean = dy.mean(axes, keepdims=True)
    return (scale * (dy - dy_mean - y * dy_y_mean),)
  return (scale * (dy - y * dy_y_mean),)


normalize.defvjp(_forward, _backward)
