"""Every norm behind one name.

A norm is a class with two methods: calling it prepares the input of a branch
(attention or MLP), and `residual` joins the branch's output to the stream. To
add one, write a class and enter it in `NORMS`.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6


class Norm(nn.Module):
  """A norm at one place of the network.

  Attributes:
    features: channels D.
    block: number of the encoder block, from 1.
    num_blocks: encoder blocks in all.
    before_mlp: whether the place is before the MLP (or before attention, or,
      for the final norm, before the head).
    dtype: of the output; statistics are float32 whatever it is.
  """

  features: int
  block: int
  num_blocks: int
  before_mlp: bool = False
  dtype: Any = jnp.float32

  # Parameters are named SLOT_0 before attention and SLOT_2 before the MLP, the
  # numbering of the published checkpoints.
  SLOT: ClassVar[str] = "LayerNorm"
  # Whether one more norm, `encoder_norm`, follows the last block.
  FINAL: ClassVar[bool] = True

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps the stream [B, N, D] to a branch's input [B, N, D]."""
    raise NotImplementedError

  def residual(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Joins the stream x [B, N, D] and a branch's output y [B, N, D]."""
    return x + y


class Affine(Norm):
  """Normalizes, then scales and shifts each channel; statistics differ."""

  def setup(self):
    self.scale = self.param("scale", nn.initializers.ones, (self.features,))
    self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

  def __call__(self, x, train):
    y = self.normalize(x.astype(jnp.float32), train)
    return (y * self.scale + self.bias).astype(self.dtype)

  def normalize(self, x, train):
    """Returns x [B, N, D], float32, with mean 0 and variance 1."""
    raise NotImplementedError


class LayerNorm(Affine):
  """Over the channels of each token (Ba et al. 2016, arXiv:1607.06450)."""

  def normalize(self, x, train):
    return _normalize(x, (2,))[0]


class GroupNorm(Affine):
  """Over all tokens and D/4 consecutive channels (arXiv:1803.08494)."""

  GROUPS: ClassVar[int] = 4

  def normalize(self, x, train):
    groups = x.reshape(*x.shape[:2], self.GROUPS, -1)
    return _normalize(groups, (1, 3))[0].reshape(x.shape)


class BatchNorm(Affine):
  """Over batch and tokens (Ioffe & Szegedy 2015, arXiv:1502.03167).

  Training normalizes with the statistics of the global batch and moves the
  running ones a tenth of the way; evaluation uses those. As in PyTorch, the
  running variance takes the unbiased estimate, unlike `flax.linen.BatchNorm`.
  """

  def setup(self):
    super().setup()
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
    self.var = self.variable("batch_stats", "var", jnp.ones, self.features)

  def normalize(self, x, train):
    if not train:
      scale = jax.lax.rsqrt(self.var.value + EPSILON)
      return (x - self.mean.value) * scale
    y, mean, var = _normalize(x, (0, 1))
    if not self.is_initializing():
      count = x.shape[0] * x.shape[1]
      unbiased = var[0, 0] * count / (count - 1)
      self.mean.value = 0.9 * self.mean.value + 0.1 * mean[0, 0]
      self.var.value = 0.9 * self.var.value + 0.1 * unbiased
    return y


class Rescale(Norm):
  """No normalization: a shift per channel and a scaled residual.

  RescaleNet (Shao et al. 2020, NeurIPS) as RescaleViT applies it. Before each
  branch the channels are centred by the mean over batch and tokens, averaged
  over the first 8 training batches and then frozen, and shifted by a learned
  bias, which counts 0.01-fold until then. Only the MLP's residual is scaled:
  with k the number of the block of L,

    x = sqrt(k / (k + 1)) * x + scale * L^(-1/2) * MLP(x + bias - init_mean)

  Evaluation never changes the calibration (RescaleViT's does).
  """

  SLOT: ClassVar[str] = "Rescale"
  FINAL: ClassVar[bool] = False
  CALIBRATION_BATCHES: ClassVar[int] = 8

  def setup(self):
    self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
    if self.before_mlp:
      self.scale = self.param("scale", nn.initializers.ones, (1,))
    self.init_mean = self.variable(
      "batch_stats", "init_mean", jnp.zeros, self.features
    )
    self.count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

  def __call__(self, x, train):
    x = x.astype(jnp.float32)
    init_mean, count = self.init_mean.value, self.count.value
    calibrating = count < self.CALIBRATION_BATCHES
    if train and not self.is_initializing():
      init_mean = jax.lax.cond(
        calibrating,
        lambda: init_mean + (x.mean((0, 1)) - init_mean) / (count + 1),
        lambda: init_mean,
      )
      init_mean = jax.lax.stop_gradient(init_mean)
      self.init_mean.value = init_mean
      self.count.value = count + calibrating
    bias = jnp.where(calibrating, 0.01, 1.0) * self.bias
    return (x + (bias - init_mean)).astype(self.dtype)

  def residual(self, x, y):
    if not self.before_mlp:
      return x + y
    skip = (self.block / (self.block + 1)) ** 0.5
    branch = self.scale * self.num_blocks**-0.5
    x = x.astype(jnp.float32)  # Or bfloat16 would round `skip`.
    return (skip * x + branch * y).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalize(x, axes):
  """Returns x with mean 0 and variance 1 over axes, and both as they were.

  The mean and the biased variance are statistics: no gradient goes through
  them as results.
  """
  return _normalize_forward(x, axes)[0]


def _normalize_forward(x, axes):
  mean = x.mean(axes, keepdims=True)
  var = jnp.square(x - mean).mean(axes, keepdims=True)
  scale = jax.lax.rsqrt(var + EPSILON)
  if jax.default_backend() == "cpu":
    # XLA would compute both anew for each element (a third of the time of a
    # small model's evaluation).
    mean, scale = jax.lax.optimization_barrier((mean, scale))
  return ((x - mean) * scale, mean, var), (x, mean, scale)


def _normalize_backward(axes, residuals, gradients):
  # Ioffe & Szegedy 2015, section 3, put together: with y the result,
  #   dx = scale * (dy - mean(dy) - y * mean(dy * y)).
  # The compiler, left to itself, computes the residual stream's gradient anew
  # in each of the parts.
  x, mean, scale = residuals
  dy, _, _ = gradients
  y = (x - mean) * scale
  dy_mean = dy.mean(axes, keepdims=True)
  dy_y_mean = (dy * y).mean(axes, keepdims=True)
  return (scale * (dy - dy_mean - y * dy_y_mean),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


NORMS: dict[str, type[Norm]] = {
  "LN": LayerNorm,
  "BN": BatchNorm,
  "GN": GroupNorm,
  "Rescale": Rescale,
}
