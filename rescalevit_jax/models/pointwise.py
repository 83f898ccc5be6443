"""What stands in for a norm without statistics: DyT, Derf and Cal."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import base
from rescalevit_jax.models.ops import normalization

# The collection of what a calibration has measured so far. Where it is mutable,
# what can be calibrated is: see `Pointwise`.
CALIBRATION = "calibration"


class Pointwise(base.Norm):
  """A learned function of each number, whatever the others are.

    y = scale * f(alpha * x) + bias

  with one alpha a place, and scale and bias for each channel. There are no
  statistics at run time. A calibration, before the first step, sets alpha to
  1 / RMS of the place's input, so that f's argument has the size that a
  normalized one has. It is a forward pass in which the collection `calibration`
  is mutable and each place is calibrated as it is met, so that the next ones
  see its output; further passes average over their batches.
  """

  ALPHA: ClassVar[float]  # Where alpha starts without a calibration.
  CALIBRATED_BY: ClassVar[tuple[str, ...]] = ("all",)

  @nn.compact
  def __call__(self, x, train):
    alpha = self.param("alpha", nn.initializers.constant(self.ALPHA), (1,))
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(jnp.float32)
    if self.is_calibrating():
      square = self.average("square", jnp.square(self.centered(x)).mean())
      alpha = jax.lax.rsqrt(jnp.maximum(square, normalization.EPSILON**2))[None]
      self.put_variable("params", "alpha", alpha)
    return self.mapped(x, alpha, scale, bias).astype(self.dtype)

  def centered(self, x):
    """Returns x [B, N, D] with what a calibration takes away from it."""
    return x

  def mapped(self, x, alpha, scale, bias):
    """Returns y [B, N, D], float32."""
    return self.function(alpha * x) * scale + bias

  def function(self, x):
    """Applies f to alpha * x, [B, N, D]."""
    raise NotImplementedError

  def is_per_token(self, train):
    return not self.is_calibrating()

  def is_calibrating(self):
    """Whether this pass is a calibration."""
    mutable = self.is_mutable_collection(CALIBRATION)
    return mutable and not self.is_initializing()

  def average(self, name, value):
    """Returns the mean of value over the passes of a calibration so far."""
    count = self.variable(CALIBRATION, f"{name}_count", jnp.zeros, ())
    mean = self.variable(CALIBRATION, name, jnp.zeros, value.shape)
    count.value += 1
    mean.value += (value - mean.value) / count.value
    return mean.value


class DyT(Pointwise):
  """Dynamic tanh: scale * tanh(alpha * x) + bias.

  Zhu et al. 2025 (CVPR, arXiv:2503.10622), with their first alpha of 0.5.
  """

  SLOT: ClassVar[str] = "DyT"
  ALPHA: ClassVar[float] = 0.5
  SATURATED: ClassVar[float | None] = 0.9**0.5  # The slope is 1 - tanh^2.

  def function(self, x):
    return jnp.tanh(x)


class Derf(Pointwise):
  """Dynamic erf: scale * erf(alpha * x + shift) + bias.

  Chen et al. 2025 (arXiv:2512.10938), DyT's successor, with their start: alpha
  0.5 and shift 0, one of each a place.
  """

  SLOT: ClassVar[str] = "Derf"
  ALPHA: ClassVar[float] = 0.5
  # The slope at u is exp(-u^2) of the steepest.
  SATURATED: ClassVar[float | None] = math.erf(math.log(10) ** 0.5)

  def function(self, x):
    shift = self.param("shift", nn.initializers.zeros, (1,))
    return jax.lax.erf(x + shift)


class Cal(Pointwise):
  """Calibrated, then linear: scale * alpha * (x - init_mean) + bias. Ours.

  A calibration sets init_mean to the mean of each channel and alpha to 1 / std
  of all numbers about these means, so that the place starts as a norm would on
  average. init_mean stays; alpha, scale and bias are learned. In evaluation and
  in training it is a linear map: `fold` puts it into the layer that follows.
  """

  SLOT: ClassVar[str] = "Cal"
  ALPHA: ClassVar[float] = 1.0
  CALIBRATED_BY: ClassVar[tuple[str, ...]] = ("auto", "all")

  def setup(self):
    self.init_mean = self.variable(
      "batch_stats", "init_mean", jnp.zeros, self.features
    )

  def centered(self, x):
    self.init_mean.value = self.average("mean", x.mean((0, 1)))
    return x - self.init_mean.value

  def mapped(self, x, alpha, scale, bias):
    # Of the stream's size is one product and one sum, whose gradients are two
    # sums; the rest is of the size of a channel.
    params = {"alpha": alpha, "scale": scale, "bias": bias}
    factor, shift = self.as_linear(params, {"init_mean": self.init_mean.value})
    return factor * x + shift

  @staticmethod
  def as_linear(params, batch_stats):
    factor = params["alpha"] * params["scale"]
    return factor, params["bias"] - factor * batch_stats["init_mean"]
