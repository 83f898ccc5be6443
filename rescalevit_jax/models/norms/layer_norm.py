"""LayerNorm, and the affine map that it shares with other norms."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rescalevit_jax.models.norms import base
from rescalevit_jax.models.ops import normalization


class Affine(base.Norm):
  """Normalization, then a learned scale and bias for each channel."""

  def setup(self):
    self.scale = self.param("scale", nn.initializers.ones, (self.features,))
    self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

  def __call__(self, x, train):
    y = self.normalize(x.astype(jnp.float32), train)
    return (y * self.scale + self.bias).astype(self.dtype)

  def normalize(
    self, x: Float[Array, "B N D"], train: bool
  ) -> Float[Array, "B N D"]:
    """Return the float32 input of the scale and bias."""
    raise NotImplementedError

  def standardize(self, x, axes):
    """Return `normalization.normalize` with the norm's epsilon."""
    return normalization.normalize(x, axes, True, self.options.epsilon)


class LayerNorm(Affine):
  """Normalize the channels of each token (Ba et al. 2016, arXiv:1607.06450)."""

  COLOR: ClassVar[str] = "#0072B2"

  def normalize(self, x, train):
    return self.standardize(x, (2,))[0]

  def is_per_token(self, train):
    return True
