"""Copies and sums with gradients that XLA compiles well for a GPU."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def fan_out(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return x three times.

  The gradients are added in the order in which cuBLAS can add all of them. XLA
  fuses an addition into a matrix product only if the product is the left
  operand and has no other addition fused.
  """
  return x, x, x


def _fan_out_forward(x):
  return (x, x, x), None


def _fan_out_backward(_, gradients):
  first, second, third = gradients
  return (first + (second + third),)


fan_out.defvjp(_fan_out_forward, _fan_out_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Return x + bias, [M, D], rounded to the dtype of x.

  The bias is rounded before the addition, which cuBLAS then makes part of the
  product x. Its gradient is summed in float32.

  Args:
    x: a product [M, D].
    bias: [D] float32.
  """
  return x + bias.astype(x.dtype)


def _add_bias_forward(x, bias):
  return x + bias.astype(x.dtype), None


def _add_bias_backward(_, dy):
  return dy, dy.astype(jnp.float32).sum(axis=0)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def add_to_batch(x: jax.Array, y: jax.Array) -> jax.Array:
  """Return x + y, [B, ...], with y [...] added to each of the B elements.

  The gradient of y is a sum over the batch, of flat arrays. If a sum leaves two
  axes or more, XLA makes the summed axes minor in its input. B would be minor
  in this gradient, and the layout would spread to all activations of a ViT on a
  GPU, with transposes around each product.
  """
  return x + y


def _add_to_batch_forward(x, y):
  return x + y, None


def _add_to_batch_backward(_, dz):
  # The barrier keeps XLA from making one sum over [B, ...] of it again.
  flat = jax.lax.optimization_barrier(dz.reshape(len(dz), -1))
  dy = flat.astype(jnp.float32).sum(axis=0).astype(dz.dtype)
  return dz, dy.reshape(dz.shape[1:])


add_to_batch.defvjp(_add_to_batch_forward, _add_to_batch_backward)
