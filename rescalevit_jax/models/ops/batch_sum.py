"""An addition whose gradient sums over the batch by a matrix product."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def add(x: jax.Array, y: jax.Array) -> jax.Array:
  """Return x + y, [B, ...], with y [...] added to each of the B elements.

  The gradient of y is a product with ones. XLA's layout assignment wants the
  axes that a reduction sums over to be the minor ones. A sum over the batch
  that leaves two axes therefore makes B the minor axis of its input, and from
  there of all activations of a ViT on a GPU, which are then transposed before
  and after every product.
  """
  return x + y


def _forward(x, y):
  return x + y, None


def _backward(_, dz):
  ones = jnp.ones((1, len(dz)), dz.dtype)
  dy = ones @ dz.reshape(len(dz), -1)
  return dz, dy.reshape(dz.shape[1:])


add.defvjp(_forward, _backward)
