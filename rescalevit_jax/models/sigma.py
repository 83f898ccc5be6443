"""Linear layers that learn their largest singular value (sigmaReparam)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from rescalevit_jax.models import linear

_INITIAL_ITERATIONS = 16


class SigmaLinear(linear.Linear):
  """A linear layer with the kernel gamma / sigma(W) * W.

  sigmaReparam (Zhai et al. 2023, arXiv:2303.06296): sigma(W) is the largest
  singular value of the parameter `kernel` as a matrix [inputs, outputs], and
  gamma is learned, starting at 1. sigma(W) = |W v| with the singular vector v
  in `batch_stats`. Each training pass improves v by one step of power
  iteration. As in the paper, v is a constant in the gradient, so the gradient
  of sigma equals the gradient of u^T W v with u = W v / |W v|.
  """

  def reparametrize(self, kernel, train):
    def first():
      v = jax.random.normal(self.make_rng("params"), kernel.shape[1:])
      return singular_vector(kernel, v)

    v = self.variable("batch_stats", "singular_vector", first)
    if train and not self.is_initializing():
      v.value = _improved(kernel, v.value)
    gamma = self.param("gamma", nn.initializers.ones, (1,))
    return kernel * (gamma / largest(kernel, v.value))


def singular_vector(
  kernel: Float[Array | np.ndarray, "..."],
  v: Float[Array | np.ndarray, " outputs"],
) -> Float[Array | np.ndarray, " outputs"]:
  """Return v after some steps of power iteration, with length 1.

  The kernel may have several axes of inputs and of outputs.
  """
  matrix = kernel.reshape(-1, v.size)
  for _ in range(_INITIAL_ITERATIONS):
    v = _improved(matrix, v)
  return v


def largest(
  kernel: Float[Array | np.ndarray, "..."],
  v: Float[Array | np.ndarray, " outputs"],
) -> Float[Array | np.ndarray, ""]:
  """Return the largest singular value sigma(W) = |W v| / |v|.

  The singular vector v has length 1, unless it is an average over steps (EMA).
  """
  product = kernel.reshape(-1, v.size) @ v
  return ((product**2).sum() / (v**2).sum()) ** 0.5


def _improved(matrix, v):
  """Return v after one step of power iteration on W^T W."""
  v = jax.lax.stop_gradient(matrix.T @ (matrix @ v))
  return v / jnp.linalg.norm(v)
