"""What a norm is: the input and output of every one of `norms.NORMS`."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import fade

# A collection without variables. It is mutable in training passes after the
# first `Norm.SETTLES_AFTER`, and tells norms to omit their calibration.
SETTLED = "settled"


class Norm(nn.Module):
  """A norm at one place of the network.

  Attributes:
    features: channels D.
    dtype: of the output; statistics are float32 whatever it is.
    ramp: when `Fade` fades at this place; None: never.
  """

  features: int
  dtype: Any = jnp.float32
  ramp: fade.Ramp | None = None

  # Parameters are named SLOT_0 before attention and SLOT_2 before the MLP, the
  # numbering of the published checkpoints.
  SLOT: ClassVar[str] = "LayerNorm"
  # Whether one more norm, `encoder_norm`, follows the last block.
  FINAL: ClassVar[bool] = True
  # Whether one more norm is inside the MLP, before its GELU.
  IN_MLP: ClassVar[bool] = False
  # What model.residual=auto is with this norm.
  RESIDUAL: ClassVar[str] = "plain"
  # The values of the config key `calibration` that have it calibrated.
  CALIBRATED_BY: ClassVar[tuple[str, ...]] = ()
  # How many training batches it takes to gather evaluation's statistics.
  NUM_STATS_BATCHES: ClassVar[int] = 0
  # Training passes after which a training pass does less; 0: all are the same.
  SETTLES_AFTER: ClassVar[int] = 0
  # |f| of the method `function` beyond which its slope is less than a tenth of
  # its steepest; None: there are no such ends.
  SATURATED: ClassVar[float | None] = None
  # Whether `as_linear` is about each token's mean over its channels.
  CENTERED: ClassVar[bool] = False

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps the stream [B, N, D] to a branch's input [B, N, D]."""
    raise NotImplementedError

  def is_per_token(self, train: bool) -> bool:
    """Return whether each token is mapped without the others in this pass."""
    del train
    return False

  def is_settled(self, train: bool) -> bool:
    """Return whether this is a training pass after `SETTLES_AFTER`."""
    # Where parameters are mutable, everything is: flax's `mutable=True`.
    everything = self.is_mutable_collection("params")
    return train and self.is_mutable_collection(SETTLED) and not everything

  @staticmethod
  def as_linear(params: Any, batch_stats: Any) -> tuple[Any, Any] | None:
    """Returns what the norm is in evaluation, if that is a linear function.

    Args:
      params: of one place, numpy arrays by name.
      batch_stats: the same place's.

    Returns:
      Factor and shift, [D] each, or None: it depends on the input's statistics
      or is curved, or class token and patches differ.
    """
    del params, batch_stats
    return None
