"""Sharpness: the Hessian's largest eigenvalue."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

ITERATIONS = 10


def sharpness(
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  labels: jax.Array,
  seed: int | jax.Array,
  *,
  model: nn.Module,
  iterations: int = ITERATIONS,
) -> dict[str, jax.Array]:
  """Measures the curvature of the loss by power iteration.

  The loss is the mean cross-entropy in evaluation mode, as a function of all
  parameters, in float32. A Hessian-vector product is the directional derivative
  of the gradient (Pearlmutter 1994); with H v for a unit vector v,

    sharpness = v^T H v,  residual = |H v - sharpness v| / |sharpness|

  v starts between the gradient, which lies mostly in the space of the largest
  eigenvalues (Gur-Ari et al. 2018, arXiv:1812.04754), and a random direction,
  and is replaced by H v / |H v|. Converged or not, the Rayleigh quotient is
  never beyond the eigenvalues at either end. It tends to the one of the largest
  magnitude, which may be negative early in training; some eigenvalue lies
  within residual * |sharpness| of it.

  Args:
    params: where the loss is measured.
    batch_stats: the statistics.
    images: [B, S, S, 3] float32 in [-1, 1].
    labels: [B] int32.
    seed: of the random direction.
    model: a `VisionTransformer`.
    iterations: Hessian-vector products.

  Returns:
    `sharpness` and `sharpness_residual`, [] float32.
  """
  # cuDNN's attention has no second derivative.
  model = model.clone(dtype=jnp.float32, attention="xla")

  def loss(params):
    logits = model.apply(
      {"params": params, "batch_stats": batch_stats}, images, train=False
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  gradient = jax.grad(loss)
  random = optax.tree.random_like(jax.random.key(seed), params)
  start = jax.tree.map(jnp.add, _unit(gradient(params)), _unit(random))

  def iterate(_, carry):
    v = _unit(carry[0])
    product = jax.jvp(gradient, (params,), (v,))[1]
    value = optax.tree.vdot(v, product)
    error = jax.tree.map(lambda hv, v: hv - value * v, product, v)
    return product, value, optax.tree.norm(error) / jnp.abs(value)

  carry = (start, jnp.zeros(()), jnp.zeros(()))
  _, value, residual = jax.lax.fori_loop(0, iterations, iterate, carry)
  return {"sharpness": value, "sharpness_residual": residual}


def _unit(tree):
  norm = optax.tree.norm(tree)
  return jax.tree.map(lambda x: x / jnp.maximum(norm, 1e-30), tree)
