"""GroupNorm."""

from typing import ClassVar

from rescalevit_jax import errors
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.ops import normalization


class GroupNorm(layer_norm.Affine):
  """Normalize groups of channels over all tokens.

  Wu & He 2018 (arXiv:1803.08494), with 4 groups of consecutive channels.
  """

  COLOR: ClassVar[str] = "#009E73"
  GROUPS: ClassVar[int] = 4

  def normalize(self, x, train):
    groups = x.reshape(*x.shape[:2], self.GROUPS, -1)
    return normalization.normalize(groups, (1, 3))[0].reshape(x.shape)

  @classmethod
  def check(cls, features, options):
    super().check(features, options)
    if features % cls.GROUPS:
      raise errors.UserError(
        f"model.hidden_size: {features} is not divisible by the {cls.GROUPS}"
        " groups of GN; choose a multiple"
      )
