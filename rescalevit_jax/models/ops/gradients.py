"""Copies and sums whose gradients XLA compiles into fast GPU programs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def fan_out(
  x: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
  """Return x three times.

  The gradients are added in an order that lets cuBLAS do all additions. XLA
  fuses an addition into a matrix product only if the product is the left
  operand and no other addition has been fused into it.
  """
  return x, x, x


fan_out.defvjp(
  lambda x: ((x, x, x), None),
  lambda _, dy: (dy[0] + (dy[1] + dy[2]),),
)


@jax.custom_vjp
def add_bias(
  x: Float[Array, "M D"], bias: Float[Array, " D"]
) -> Float[Array, "M D"]:
  """Return x + bias in the dtype of x.

  The bias is rounded before the addition, so cuBLAS can add it to the matrix
  product x. Its gradient is summed in float32.
  """
  return x + bias.astype(x.dtype)


add_bias.defvjp(
  lambda x, bias: (x + bias.astype(x.dtype), None),
  lambda _, dy: (dy, dy.astype(jnp.float32).sum(axis=0)),
)


@jax.custom_vjp
def add_to_batch(
  x: Float[Array, "B ..."], y: Float[Array, "..."]
) -> Float[Array, "B ..."]:
  """Return x + y, with y broadcast over the batch.

  The gradient of y is a sum over the batch of flat arrays. XLA makes the summed
  axes minor in the input of a sum if two or more axes remain. The batch axis
  would then be minor in all activations of a ViT on a GPU, with transposes
  around each product.
  """
  return x + y


def _add_to_batch_backward(_, dz):
  # The barrier prevents XLA from rewriting it as one sum over [B, ...].
  flat = jax.lax.optimization_barrier(dz.reshape(len(dz), -1))
  dy = flat.astype(jnp.float32).sum(axis=0).astype(dz.dtype)
  return dz, dy.reshape(dz.shape[1:])


add_to_batch.defvjp(lambda x, y: (x + y, None), _add_to_batch_backward)
