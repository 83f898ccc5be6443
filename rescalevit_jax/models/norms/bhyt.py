"""BHyT: a tanh of the token divided by its RMS."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models.norms import functions
from rescalevit_jax.models.norms import traits

_KAPPA = 10.0


class BHyT(traits.Saturating):
  """Bounded hyperbolic tangent: scale * tanh(lam * x / (10 * RMS(x))).

  Byun et al. 2026 (ICML, arXiv:2601.09719), with kappa = 10 and an initial lam
  of 2, as in their code (`BHyT_Star`). lam is one learned number per site.
  Their BHyT computes the RMS before attention only and approximates it before
  the MLP to save time; this is their exact form.
  """

  SLOT: ClassVar[str] = "BHyT"
  COLOR: ClassVar[str] = "#004488"
  FUNCTION: ClassVar[functions.Function] = functions.FUNCTIONS["tanh"]

  @nn.compact
  def __call__(self, x, train):
    lam = self.param("lam", nn.initializers.constant(2.0), (1,))
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    x = x.astype(jnp.float32)
    square = jnp.square(x).mean(-1, keepdims=True)
    own = jax.lax.rsqrt(square + self.options.epsilon)
    return (self.function(lam / _KAPPA * own * x) * scale).astype(self.dtype)

  def is_per_token(self, train):
    return True
