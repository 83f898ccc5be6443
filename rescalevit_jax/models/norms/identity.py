"""No norm."""

from typing import ClassVar

from rescalevit_jax.models.norms import base


class Identity(base.Norm):
  """Return the input: the norm of a model whose norms have been folded."""

  SLOT: ClassVar[str] = "Identity"
  FINAL: ClassVar[bool] = False
  COLOR: ClassVar[str] = "#332288"

  def __call__(self, x, train):
    return x

  def is_per_token(self, train):
    return True
