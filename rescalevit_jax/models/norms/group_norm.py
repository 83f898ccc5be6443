"""GroupNorm."""

from typing import ClassVar

from rescalevit_jax import errors
from rescalevit_jax.models.norms import layer_norm


class GroupNorm(layer_norm.Affine):
  """Normalize groups of channels over all tokens.

  Wu & He 2018 (arXiv:1803.08494). A group has consecutive channels.
  """

  COLOR: ClassVar[str] = "#009E73"

  def normalize(self, x, train):
    groups = x.reshape(*x.shape[:2], self.options.groups, -1)
    return self.standardize(groups, (1, 3))[0].reshape(x.shape)

  @classmethod
  def check(cls, features, options):
    super().check(features, options)
    if features % options.groups:
      raise errors.UserError(
        f"model.hidden_size: {features} is not divisible by the"
        f" {options.groups} groups of GN (model.gn_groups); choose a multiple"
      )
