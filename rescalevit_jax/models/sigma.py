"""Linear layers that learn their largest singular value."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import linear

_FIRST_ITERATIONS = 16


class SigmaLinear(linear.Linear):
  """A linear layer with the kernel gamma / sigma(W) * W.

  sigmaReparam (Zhai et al. 2023, arXiv:2303.06296): sigma(W) is the largest
  singular value of the parameter `kernel` as a matrix [inputs, outputs], and
  gamma is learned, from 1. sigma(W) = |W v|. One step of power iteration in
  each training pass improves v, which is kept in `batch_stats`. As in the
  paper, v is a constant in the gradient, so sigma's gradient is that of u^T W v
  with u = W v / |W v|.
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


def singular_vector(kernel: Any, v: Any) -> Any:
  """Returns v after some steps of power iteration, of length 1, [outputs].

  Args:
    kernel: a layer's, whatever the axes of its inputs and outputs.
    v: where to begin, [outputs].
  """
  matrix = kernel.reshape(-1, v.size)
  for _ in range(_FIRST_ITERATIONS):
    v = _improved(matrix, v)
  return v


def largest(kernel: Any, v: Any) -> Any:
  """Returns sigma(W) = |W v| / |v|, of NumPy's arrays or JAX's.

  v is of length 1, but for an average over the steps.

  Args:
    kernel: see `singular_vector`.
    v: the singular vector, [outputs].
  """
  product = kernel.reshape(-1, v.size) @ v
  return ((product**2).sum() / (v**2).sum()) ** 0.5


def _improved(matrix, v):
  """One step of power iteration on W^T W, v [outputs]."""
  v = jax.lax.stop_gradient(matrix.T @ (matrix @ v))
  return v / jnp.linalg.norm(v)
