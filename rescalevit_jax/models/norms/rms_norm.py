"""RMSNorm."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from rescalevit_jax.models.norms import base
from rescalevit_jax.models.ops import normalization


class RMSNorm(base.Norm):
  """Divide each token by the root mean square of its channels, then scale.

  Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4: LayerNorm without the mean
  and the bias.
  """

  SLOT: ClassVar[str] = "RMSNorm"
  COLOR: ClassVar[str] = "#CC79A7"

  @nn.compact
  def __call__(self, x, train):
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    x = x.astype(jnp.float32)
    y, _, _ = normalization.normalize(x, (-1,), False, self.options.epsilon)
    return (y * scale).astype(self.dtype)

  def is_per_token(self, train):
    return True
