"""Sharpness-aware minimization (SAM)."""

import jax
from jaxtyping import Array, Float, PyTree

from rescalevit_jax.optim import clipping


def ascend(
  params: PyTree[Float[Array, "..."]],
  grads: PyTree[Float[Array, "..."]],
  rho: float,
) -> PyTree[Float[Array, "..."]]:
  """Return the parameters at which SAM takes its second gradient.

  Foret et al. 2021 (arXiv:2010.01412), equation 2 with p = 2: the step to the
  approximately highest loss within the distance rho,

    w + rho * g / |g|,

  for the vectors w of all parameters and g of their gradient.
  """
  scale = rho / (clipping.global_norm(grads) + 1e-12)  # As in their code.
  return jax.tree.map(lambda w, g: w + scale * g, params, grads)
