"""Pointwise functions that replace a norm: DyT, Derf and Cal."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import normalization


class Pointwise(traits.Calibrated):
  """A learned function of each number: y = scale * f(alpha * x) + bias.

  A site has one alpha, and a scale and a bias for each channel. There are no
  statistics at run time. A calibration sets alpha to 1 / RMS of the site's
  input, which gives the argument of f the size of a normalized input.
  """

  ALPHA: ClassVar[float]  # Initial alpha without a calibration.

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
    return self.map(x, alpha, scale, bias).astype(self.dtype)

  def centered(self, x):
    """Return x minus the mean that a calibration subtracts."""
    return x

  def map(self, x, alpha, scale, bias):
    """Return y in float32."""
    return self.function(alpha * x) * scale + bias

  def function(self, x):
    """Return f(x) of the argument alpha * x."""
    raise NotImplementedError

  def is_per_token(self, train):
    return not self.is_calibrating()

  def is_calibrating(self):
    """Return whether this pass is a calibration."""
    mutable = self.is_mutable_collection(traits.CALIBRATION)
    return mutable and not self.is_initializing()

  def average(self, name, value):
    """Return the mean of value over the passes of the calibration so far."""
    count = self.variable(traits.CALIBRATION, f"{name}_count", jnp.zeros, ())
    mean = self.variable(traits.CALIBRATION, name, jnp.zeros, value.shape)
    count.value += 1
    mean.value += (value - mean.value) / count.value
    return mean.value


class DyT(Pointwise, traits.Saturating):
  """Dynamic tanh: scale * tanh(alpha * x) + bias.

  Zhu et al. 2025 (CVPR, arXiv:2503.10622), with their initial alpha of 0.5.
  """

  SLOT: ClassVar[str] = "DyT"
  COLOR: ClassVar[str] = "#56B4E9"
  ALPHA: ClassVar[float] = 0.5
  SATURATED: ClassVar[float] = 0.9**0.5  # The slope is 1 - tanh^2.

  def function(self, x):
    return jnp.tanh(x)


class Derf(Pointwise, traits.Saturating):
  """Dynamic erf: scale * erf(alpha * x + shift) + bias.

  Chen et al. 2025 (arXiv:2512.10938), with their initial alpha of 0.5 and shift
  of 0. A site has one of each.
  """

  SLOT: ClassVar[str] = "Derf"
  COLOR: ClassVar[str] = "#000000"
  ALPHA: ClassVar[float] = 0.5
  # The slope at u is exp(-u^2) times the maximum.
  SATURATED: ClassVar[float] = math.erf(math.log(10) ** 0.5)

  def function(self, x):
    shift = self.param("shift", nn.initializers.zeros, (1,))
    return jax.lax.erf(x + shift)


class Cal(Pointwise, traits.Foldable):
  """A calibrated linear map: scale * alpha * (x - init_mean) + bias. Ours.

  A calibration sets `init_mean` to the mean of each channel, and alpha to
  1 / std of the centered numbers. The site then starts like a norm with average
  statistics. `init_mean` stays fixed; alpha, scale and bias are learned. The
  map is linear in training and in evaluation.
  """

  SLOT: ClassVar[str] = "Cal"
  COLOR: ClassVar[str] = "#882255"
  ALPHA: ClassVar[float] = 1.0
  CALIBRATED_BY: ClassVar[tuple[str, ...]] = ("auto", "all")

  def setup(self):
    self.init_mean = self.variable(
      "batch_stats", "init_mean", jnp.zeros, self.features
    )

  def centered(self, x):
    self.init_mean.value = self.average("mean", x.mean((0, 1)))
    return x - self.init_mean.value

  def map(self, x, alpha, scale, bias):
    # One product and one sum have the size of x, and their gradients are two
    # sums. Everything else has the size of the channels.
    params = {"alpha": alpha, "scale": scale, "bias": bias}
    factor, shift = self.as_linear(params, {"init_mean": self.init_mean.value})
    return factor * x + shift

  @staticmethod
  def as_linear(params, batch_stats):
    factor = params["alpha"] * params["scale"]
    return factor, params["bias"] - factor * batch_stats["init_mean"]
