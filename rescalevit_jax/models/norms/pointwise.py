"""Pointwise functions that replace a norm: DyT, Derf, Cal and others."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax import errors
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import functions
from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import normalization


def parse_alphas(value: str | float | None) -> tuple[float | str | None, ...]:
  """Return the initial alphas of attention, MLP and final norm.

  The value is a number above 0 or 'calibrated', for all, or three of them as
  text with commas. None: the norm's default.
  """
  if value is None:
    return (None,) * len(base.SITES)
  words = str(value).split(",")
  try:
    alphas = [x if x == base.CALIBRATED else float(x) for x in words]
  except ValueError:
    alphas = []
  numbers = [x for x in alphas if isinstance(x, float)]
  valid = all(0 < x < math.inf for x in numbers)
  if len(alphas) not in (1, len(base.SITES)) or not valid:
    raise errors.UserError(
      f"model.alpha_init: {value!r} is neither a number above 0 nor"
      f" {base.CALIBRATED!r}, nor three of them; use a value such as 0.5 or"
      " 0.8,0.2,0.2"
    )
  return tuple(alphas if len(alphas) > 1 else alphas * len(base.SITES))


class Pointwise(traits.Calibrated):
  """A learned function of each element: y = scale * f(alpha * x) + bias.

  A site has one alpha, and a scale and a bias for each channel. There are no
  statistics at run time. A calibration sets alpha to 1 / RMS of the site's
  input, so the argument of f has RMS 1, as a normalized input.
  """

  ALPHA: ClassVar[float] = 0.5  # Initial alpha without a calibration.

  @nn.compact
  def __call__(self, x, train):
    own = self.options.alpha in (None, base.CALIBRATED)
    alpha = self.ALPHA if own else self.options.alpha
    init = nn.initializers.constant(self.parameter(alpha))
    alpha = self.param(self.PARAMETER, init, (1,))
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(jnp.float32)
    if self.is_calibrating():
      square = self.average("square", jnp.square(self.centered(x)).mean())
      if own:
        alpha = jax.lax.rsqrt(jnp.maximum(square, normalization.EPSILON**2))
        alpha = self.parameter(alpha)[None]
        self.put_variable("params", self.PARAMETER, alpha)
    return self.map(x, alpha, scale, bias).astype(self.dtype)

  def parameter(self, alpha):
    """Return the value of the parameter for an alpha."""
    return alpha

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

  @classmethod
  def check(cls, features, options):
    """Accept all options."""


class Bounded(Pointwise, traits.Saturating):
  """scale * f(alpha * x + shift) + bias, with a bounded f.

  The functions with a shift are candidates of Chen et al. 2025
  (arXiv:2512.10938), whose code starts all alphas at 0.5 and shifts at 0. A
  site has one of each.
  """

  SHIFTED: ClassVar[bool] = True

  def function(self, x):
    if self.SHIFTED:
      x = x + self.param("shift", nn.initializers.zeros, (1,))
    return self.FUNCTION.apply(x)


class DyT(Bounded):
  """Dynamic tanh: scale * tanh(alpha * x) + bias.

  Zhu et al. 2025 (CVPR, arXiv:2503.10622), with their initial alpha of 0.5.
  Their language models start with a larger alpha before attention.
  """

  SLOT: ClassVar[str] = "DyT"
  COLOR: ClassVar[str] = "#56B4E9"
  FUNCTION: ClassVar[functions.Function] = functions.FUNCTIONS["tanh"]
  SHIFTED: ClassVar[bool] = False


def _shifted(name: str, function: str, color: str) -> type[Bounded]:
  """Return the class of a function of u = alpha * x + shift."""
  fields = {
    "__doc__": f"scale * f(alpha * x + shift) + bias; f is {function}.",
    "__module__": __name__,
    "SLOT": name,
    "COLOR": color,
    "FUNCTION": functions.FUNCTIONS[function],
  }
  return type(name, (Bounded,), fields)


# Derf (dynamic erf) is the best function of Chen et al.
SHIFTED = {
  name: _shifted(name, *row)
  for name, row in {
    "Derf": ("erf", "#000000"),
    "ISRU": ("isru", "#EE3377"),
    "HardTanh": ("clip", "#117733"),
    "Arctan": ("arctan", "#44AA99"),
    "Softsign": ("softsign", "#DDAA33"),
  }.items()
}


class DyISRU(Bounded):
  """Dynamic ISRU: scale * sqrt(D) * x / sqrt(beta + x^2) + bias.

  Stollenwerk 2025 (arXiv:2503.21708), the elementwise counterpart of RMSNorm:
  the learned beta replaces the sum of x^2 over the token's other channels. At 0
  the slope is sqrt(D / beta) = alpha. beta starts at 4 D, the slope of DyT.
  """

  SLOT: ClassVar[str] = "DyISRU"
  COLOR: ClassVar[str] = "#AA4499"
  FUNCTION: ClassVar[functions.Function] = functions.FUNCTIONS["isru"]
  SHIFTED: ClassVar[bool] = False
  PARAMETER: ClassVar[str] = "beta"

  def parameter(self, alpha):
    return self.features / alpha**2

  def map(self, x, beta, scale, bias):
    inner = jax.lax.rsqrt(jnp.maximum(beta, normalization.EPSILON))
    return self.function(inner * x) * (self.features**0.5 * scale) + bias


class Linear(Pointwise, traits.Foldable):
  """The control without a bound: scale * alpha * x + bias. Ours."""

  SLOT: ClassVar[str] = "Linear"
  COLOR: ClassVar[str] = "#BBBB77"

  def map(self, x, alpha, scale, bias):
    return alpha * scale * x + bias

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    return params["alpha"] * params["scale"], params["bias"]


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
    # One product and one sum work on arrays of x's size. The backward pass
    # needs two sums of that size. All other arrays have one element per
    # channel.
    params = {"alpha": alpha, "scale": scale, "bias": bias}
    stats = {"init_mean": self.init_mean.value}
    factor, shift = self.as_linear(params, stats, self.options.epsilon)
    return factor * x + shift

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    factor = params["alpha"] * params["scale"]
    return factor, params["bias"] - factor * batch_stats["init_mean"]
