"""Every norm behind one name.

A norm prepares the input of a branch (attention or MLP) or of the head. To add
one, write a class and enter it in `NORMS`. How a branch's output joins the
stream is another choice: see `residuals`.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.models import base
from rescalevit_jax.models import fade
from rescalevit_jax.models import pointwise
from rescalevit_jax.models.ops import normalization

IN_MLP = "BatchNorm_1"  # The name of a norm inside the MLP.


class Affine(base.Norm):
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
    return normalization.normalize(x, (2,))[0]

  def is_per_token(self, train):
    return True


class Fade(Affine):
  """LayerNorm whose sigma fades to a frozen one, in a fine-tuning. Ours.

    z = (x - mean) / (sigma^(1 - t) * frozen^t)
    y = scale * tanh(t * alpha * z) / (t * alpha) + bias

  with mean and sigma the token's own, frozen the running geometric mean of
  sigma over a place's class tokens or patches, and t from 0, LayerNorm, to 1,
  from when on `frozen` stays: a linear map if alpha is 0, where tanh(az) / a is
  z, else DyT of x - mean with a fixed alpha. Parameters are LayerNorm's, so
  that any of its checkpoints loads. Training passes move t: see
  `fade.Schedule`.
  """

  CENTERED: ClassVar[bool] = True
  SATURATED: ClassVar[float | None] = pointwise.DyT.SATURATED

  def setup(self):
    super().setup()
    self.log_sigma = self.variable("batch_stats", "log_sigma", jnp.zeros, 2)
    self.alpha = self.variable(
      "batch_stats",
      "alpha",
      lambda: jnp.float32(0 if self.ramp is None else self.ramp.alpha),
    )
    self.count, self.faded = (
      self.variable("batch_stats", name, jnp.zeros, (), jnp.int32)
      for name in (fade.COUNT, fade.FADED)
    )

  def normalize(self, x, train):
    log_sigma, faded = self.log_sigma.value, self.faded.value
    log_frozen = fade.by_token(log_sigma, x.shape[1])
    share = faded / fade.FULL
    y, log_own = fade.normalize(x, log_frozen, share)
    if train and not self.is_initializing():
      count = self.count.value + 1
      apart = self.ramp is None or self.ramp.separate_cls
      moved = fade.update_running_mean(log_sigma, log_own, count, apart)
      self.log_sigma.value = jnp.where(faded < fade.FULL, moved, log_sigma)
      self.count.value = count
      if self.ramp is not None:
        # Whatever that of a file was.
        self.alpha.value = jnp.float32(self.ramp.alpha)
        self.faded.value = jnp.maximum(faded, self.ramp.faded(count))
    if self.ramp is None:
      return self.scaled_tanh(y, share * self.alpha.value)
    if self.ramp.alpha > 0:
      y = self.scaled_tanh(y, share * self.ramp.alpha)
    return y

  def is_per_token(self, train):
    return not train

  def scaled_tanh(self, y, alpha):
    """Returns tanh(alpha * y) / alpha [B, N, D]; y itself for alpha 0."""
    curved = self.function(alpha * y) / jnp.where(alpha > 0, alpha, 1.0)
    return jnp.where(alpha > 0, curved, y)

  def function(self, x):
    """Applies tanh, for those who look at it, as at DyT's."""
    return jnp.tanh(x)

  @staticmethod
  def as_linear(params, batch_stats):
    of_class_token, of_patches = batch_stats["log_sigma"]
    linear = batch_stats["faded"] == fade.FULL and batch_stats["alpha"] == 0
    if not linear or of_class_token != of_patches:
      return None
    return params["scale"] * np.exp(-of_patches), params["bias"]


class GroupNorm(Affine):
  """Over all tokens and D/4 consecutive channels (arXiv:1803.08494)."""

  GROUPS: ClassVar[int] = 4

  def normalize(self, x, train):
    groups = x.reshape(*x.shape[:2], self.GROUPS, -1)
    return normalization.normalize(groups, (1, 3))[0].reshape(x.shape)


class BatchNorm(Affine):
  """Over batch and tokens (Ioffe & Szegedy 2015, arXiv:1502.03167).

  Training normalizes with the statistics of the global batch and moves the
  running ones a tenth of the way; evaluation uses those. As in PyTorch, the
  running variance takes the unbiased estimate, unlike `flax.linen.BatchNorm`.
  """

  NUM_STATS_BATCHES: ClassVar[int] = (
    48  # Then the start has a weight of 0.9^48.
  )

  def setup(self):
    super().setup()
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
    self.var = self.variable("batch_stats", "var", jnp.ones, self.features)

  def normalize(self, x, train):
    if not train:
      scale = jax.lax.rsqrt(self.var.value + normalization.EPSILON)
      return (x - self.mean.value) * scale
    y, mean, var = normalization.normalize(x, (0, 1))
    if not self.is_initializing():
      count = x.shape[0] * x.shape[1]
      unbiased = var[0, 0] * count / (count - 1)
      self.mean.value = 0.9 * self.mean.value + 0.1 * mean[0, 0]
      self.var.value = 0.9 * self.var.value + 0.1 * unbiased
    return y

  def is_per_token(self, train):
    return not train


class BatchNorm2(BatchNorm):
  """BatchNorm with one more in the MLP, between its first layer and the GELU.

  Yao et al. 2021 (Leveraging Batch Normalization for Vision Transformers, ICCV
  Workshops): without it the MLP's hidden layer is unnormalized, and training
  crashes at times.
  """

  IN_MLP: ClassVar[bool] = True


class RMSNorm(base.Norm):
  """Divides each token by the root mean square of its channels, then scales.

  Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4: LayerNorm without the mean
  and the bias.
  """

  SLOT: ClassVar[str] = "RMSNorm"

  @nn.compact
  def __call__(self, x, train):
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    x = x.astype(jnp.float32)
    y, _, _ = normalization.normalize(x, (x.ndim - 1,), False)
    return (y * scale).astype(self.dtype)

  def is_per_token(self, train):
    return True


class Rescale(base.Norm):
  """No normalization: a shift per channel, x + bias - init_mean.

  RescaleNet (Shao et al. 2020, NeurIPS) as RescaleViT applies it. Before each
  branch the channels are centred by the mean over batch and tokens, averaged
  over the first 8 training batches and then frozen, and shifted by a learned
  bias, which counts 0.01-fold until then. The residual that goes with it is
  `residuals.Original`.

  Evaluation never changes the calibration (RescaleViT's does).
  """

  SLOT: ClassVar[str] = "Rescale"
  FINAL: ClassVar[bool] = False
  RESIDUAL: ClassVar[str] = "rescalevit"
  CALIBRATION_BATCHES: ClassVar[int] = 8
  NUM_STATS_BATCHES: ClassVar[int] = CALIBRATION_BATCHES
  SETTLES_AFTER: ClassVar[int] = CALIBRATION_BATCHES

  def setup(self):
    self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
    self.init_mean = self.variable(
      "batch_stats", "init_mean", jnp.zeros, self.features
    )
    self.count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

  def __call__(self, x, train):
    x = x.astype(jnp.float32)
    bias, init_mean = self.bias, self.init_mean.value
    if not self.is_settled(train):
      count = self.count.value
      calibrating = count < self.CALIBRATION_BATCHES
      if train and not self.is_initializing():
        moved = init_mean + (x.mean((0, 1)) - init_mean) / (count + 1)
        init_mean = jnp.where(calibrating, moved, init_mean)
        init_mean = jax.lax.stop_gradient(init_mean)
        self.init_mean.value = init_mean
        self.count.value = count + calibrating
      bias = jnp.where(calibrating, 0.01, 1.0) * bias
    return (x + (bias - init_mean)).astype(self.dtype)

  def is_per_token(self, train):
    return not train or self.is_settled(train)

  @staticmethod
  def as_linear(params, batch_stats):
    calibrating = batch_stats["count"] < Rescale.CALIBRATION_BATCHES
    bias = np.where(calibrating, 0.01, 1.0) * params["bias"]
    return np.ones_like(bias), bias - batch_stats["init_mean"]


class Identity(base.Norm):
  """No norm at all: what is left of one that was folded into the next layer."""

  SLOT: ClassVar[str] = "Identity"
  FINAL: ClassVar[bool] = False

  def __call__(self, x, train):
    return x

  def is_per_token(self, train):
    return True


NORMS: dict[str, type[base.Norm]] = {
  "LN": LayerNorm,
  "BN": BatchNorm,
  "GN": GroupNorm,
  "Rescale": Rescale,
  "RMS": RMSNorm,
  "DyT": pointwise.DyT,
  "Derf": pointwise.Derf,
  "Cal": pointwise.Cal,
  "BN2": BatchNorm2,
  "Fade": Fade,
  "Identity": Identity,
}
