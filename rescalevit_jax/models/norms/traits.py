"""Optional abilities of norms, for training, diagnostics and export.

See `gradual` for norms that change gradually.

A norm inherits from the classes below that apply to it. Callers check with
`issubclass`.
"""

from typing import ClassVar

import numpy as np

from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import functions

# The collection of the averages of a calibration; see `Calibrated`.
CALIBRATION = "calibration"
# The collection of terms that norms add to the training loss.
LOSSES = "losses"
# A collection without variables; see `Settling`.
SETTLED = "settled"


class Calibrated(base.Norm):
  """A norm whose parameters a calibration sets before the first step.

  A calibration is a forward pass in which the collection `CALIBRATION` is
  mutable. Each site is calibrated when the pass reaches it, so the next site
  sees its output. Further passes average over their batches.
  """

  # The values of the config key `calibration` that calibrate this norm.
  CALIBRATED_BY: ClassVar[tuple[str, ...]] = ("all",)
  # The parameter that a calibration sets.
  PARAMETER: ClassVar[str] = "alpha"

  @classmethod
  def is_calibrated_by(cls, calibration: str, alpha_init: str | None) -> bool:
    """Return whether a run with these config keys calibrates the norm."""
    asked = base.CALIBRATED in (alpha_init or "")
    return asked or calibration in cls.CALIBRATED_BY


class RunningStatistics(base.Norm):
  """A norm that evaluates with statistics of training batches."""

  @staticmethod
  def num_stats_batches(options: base.Options) -> int:
    """Return the number of training batches that determine the statistics."""
    raise NotImplementedError


class Settling(base.Norm):
  """A norm that does less work in training after its first passes.

  The collection `SETTLED` is mutable in training passes after the first
  `SETTLES_AFTER`. The compiled program then omits the work of the first ones.
  """

  SETTLES_AFTER: ClassVar[int]

  def is_settled(self, train: bool) -> bool:
    """Return whether this is a training pass after `SETTLES_AFTER`."""
    # With flax's `mutable=True` every collection is mutable.
    everything = self.is_mutable_collection("params")
    return train and self.is_mutable_collection(SETTLED) and not everything


class Saturating(base.Norm):
  """A norm with a bounded function; diagnostics measure its saturation."""

  FUNCTION: ClassVar[functions.Function]

  def function(self, x):
    """Return the bounded function of x."""
    return self.FUNCTION.apply(x)


class Foldable(base.Norm):
  """A norm that is linear in evaluation and folds into the next layer.

  One inside the MLP (`IN_MLP`) folds into the layer before it.
  """

  # True if `as_linear` applies to x minus each token's mean.
  CENTERED: ClassVar[bool] = False

  @staticmethod
  def as_linear(
    params: dict[str, np.ndarray],
    batch_stats: dict[str, np.ndarray],
    epsilon: float,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor and the shift of each channel at one site.

    Raises:
      ValueError: the norm at this site is not linear.
    """
    raise NotImplementedError
