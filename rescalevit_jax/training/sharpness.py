"""Sharpness: the largest eigenvalue of the Hessian."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32
import optax


def sharpness(
  params: Any,
  batch_stats: Any,
  images: Float32[Array, "B S S 3"],
  labels: Int32[Array, " B"],
  seed: int | jax.Array,
  *,
  model: nn.Module,
  iterations: int = 10,
) -> dict[str, jax.Array]:
  """Estimate the sharpness of the loss by power iteration.

  The loss is the mean cross-entropy in evaluation mode, in float32, as a
  function of all parameters. A Hessian-vector product is the directional
  derivative of the gradient (Pearlmutter 1994). For a unit vector v,

    sharpness = v^T H v,  residual = |H v - sharpness v| / |sharpness|

  v starts at the sum of the unit gradient, which lies mostly in the space of
  the largest eigenvalues (Gur-Ari et al. 2018, arXiv:1812.04754), and a random
  unit vector. Each iteration replaces v by H v / |H v|. The Rayleigh quotient
  never exceeds the extreme eigenvalues. It converges to the eigenvalue of the
  largest magnitude, which may be negative early in training; some eigenvalue
  lies within residual * |sharpness| of it.

  Images are in [-1, 1].

  Returns:
    The scalars `sharpness` and `sharpness_residual`.
  """
  # cuDNN's attention has no second derivative.
  model = model.clone(
    config=dataclasses.replace(model.config, dtype="float32", attention="xla")
  )

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
