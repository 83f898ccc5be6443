"""Gradient clipping: by global norm, and adaptively for each unit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import optax

from rescalevit_jax.optim import kernels

# Lower bound of a unit's weight norm in AGC. Weights that start at 0 could not
# move without it (Brock et al. 2021, section 4.1).
_MIN_WEIGHT_NORM = 1e-3

_SMALL = 2**10  # Elements of a small array, for `global_norm`.


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Return a clipping of all gradients by their global norm; 0: no clipping."""
  if max_norm == 0:
    return optax.identity()

  def clip(updates, _):
    factor = jnp.minimum(1.0, max_norm / global_norm(updates))
    return jax.tree.map(lambda x: factor * x, updates)

  return optax.stateless(clip)


def adaptive_clip(clipping: float) -> optax.GradientTransformation:
  """Return adaptive gradient clipping, AGC (Brock et al., arXiv:2102.06171).

  Equation 3, with w the weights of one unit and g their gradient:

    g = g * min(1, clipping * max(|w|, 1e-3) / |g|)

  A unit is one output of a kernel. Any other parameter is a unit as a whole.
  The head is not clipped (section 4.1).
  """
  clip = optax.adaptive_grad_clip(clipping, eps=_MIN_WEIGHT_NORM, axis=0)

  def as_matrices(tree):
    def as_matrix(path, x):
      is_kernel = kernels.is_kernel(path)
      return x.reshape(kernels.matrix_shape(path, x) if is_kernel else (-1, 1))

    return jax.tree.map_with_path(as_matrix, tree)

  def update(grads, state, params):
    clipped, state = clip.update(as_matrices(grads), state, as_matrices(params))
    clipped = jax.tree.map(lambda x, g: x.reshape(g.shape), clipped, grads)
    if "head" in grads:
      clipped["head"] = grads["head"]
    return clipped, state

  return optax.GradientTransformation(clip.init, update)


def global_norm(tree: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
  """Return the norm of all arrays of a tree as one vector, in float32.

  Equals `optax.global_norm`, which launches two GPU kernels for each array.
  Small arrays are concatenated here, and large ones are reduced by rows first.
  """
  leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
  small = [x.ravel() for x in leaves if x.size <= _SMALL]
  # Keep the first axis: reshaping would move data between devices with FSDP.
  large = [jnp.square(x) for x in leaves if x.size > _SMALL]
  sums = [jnp.square(x) for x in small]
  sums += [x.sum(range(1, x.ndim)) for x in large]
  # Without the barrier XLA would rewrite this as a sum of separate sums.
  sums = jax.lax.optimization_barrier(jnp.concatenate(sums))
  return jnp.sqrt(sums.sum())
