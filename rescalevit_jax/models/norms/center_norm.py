"""CenterNorm of LipsFormer."""

from typing import ClassVar

from rescalevit_jax import errors
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import traits


class CenterNorm(layer_norm.Affine, traits.Foldable):
  """Subtract the token's mean: scale * D / (D - 1) * (x - mean) + bias.

  Qi et al. 2023 (LipsFormer, ICLR, arXiv:2304.09856), as in their code:
  LayerNorm without the division, so it is linear and Lipschitz continuous. Its
  residual is `residuals.Weighted`. LipsFormer also places it after each
  addition (`norm_position=post`), and has cosine attention and a spectral
  initialization, which are not implemented.
  """

  SLOT: ClassVar[str] = "CenterNorm"
  COLOR: ClassVar[str] = "#EE99AA"
  RESIDUAL: ClassVar[str] = "weighted"
  CENTERED: ClassVar[bool] = True

  @classmethod
  def check(cls, features, options):
    super().check(features, options)
    if features < 2:
      raise errors.UserError(
        "model.hidden_size: Center needs two channels or more; raise it"
      )

  def normalize(self, x, train):
    factor = self.features / (self.features - 1)
    return factor * (x - x.mean(-1, keepdims=True))

  def is_per_token(self, train):
    return True

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    scale = params["scale"]
    return scale.size / (scale.size - 1) * scale, params["bias"]
