"""The interface of a norm."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rescalevit_jax import errors
from rescalevit_jax.models.ops import normalization

SITES = ("attention", "mlp", "final")
CALIBRATED = "calibrated"


@dataclasses.dataclass(frozen=True)
class Options:
  """Constants of a norm at one site."""

  # Initial alpha of a pointwise function; `CALIBRATED`: from a calibration;
  # None: the norm's own.
  alpha: float | str | None = None
  epsilon: float = normalization.EPSILON  # Added to variances, mean squares.
  momentum: float = 0.9  # Of running means and variances.
  groups: int = 4  # Of GroupNorm.


class Norm(nn.Module):
  """A norm at one site: before a branch of a block, or before the head."""

  features: int  # Number of channels D.
  dtype: Any = jnp.float32  # Of the output; statistics are float32.
  options: Options = Options()

  # The module is named SLOT_0 before attention and SLOT_2 before the MLP, the
  # numbering of the published checkpoints.
  SLOT: ClassVar[str] = "LayerNorm"
  # True if the model has a final norm, `encoder_norm`.
  FINAL: ClassVar[bool] = True
  # The name of another norm inside the MLP, before its GELU.
  IN_MLP: ClassVar[str | None] = None
  # The residual that model.residual=auto selects.
  RESIDUAL: ClassVar[str] = "plain"
  # The color in plots. NORMS has Okabe and Ito's palette for color-blind
  # readers (https://jfly.uni-koeln.de/color/) and colors of Paul Tol's.
  COLOR: ClassVar[str] = "#AAAAAA"

  def __call__(
    self, x: Float[Array, "B N D"], train: bool
  ) -> Float[Array, "B N D"]:
    """Return the input of the branch or of the head."""
    raise NotImplementedError

  def is_per_token(self, train: bool) -> bool:
    """Return whether this pass maps each token independently of the others.

    If so and with pool=cls, the last block computes only the class token.
    """
    del train
    return False

  @classmethod
  def check(cls, features: int, options: Options) -> None:
    """Raise a UserError if the norm cannot have these channels or options."""
    del features
    if options.alpha is not None:
      raise errors.UserError(
        f"model.alpha_init: {cls.__name__} has no alpha; choose None"
      )
