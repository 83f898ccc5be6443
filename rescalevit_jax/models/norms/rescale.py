"""Rescale, RescaleViT's replacement of a norm."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.models.norms import traits


class Rescale(traits.RunningStatistics, traits.Settling, traits.Foldable):
  """Shift each channel, x + bias - init_mean, without normalization.

  RescaleNet (Shao et al. 2020, NeurIPS) as in RescaleViT. Before each branch
  the channels are centered by `init_mean`, the mean over batch and tokens of
  the first 8 micro-batches, and shifted by a learned bias. Until `init_mean`
  is complete the bias is multiplied by 0.01. The residual is
  `residuals.RescaleViT`.

  Evaluation never changes `init_mean`. It does in RescaleViT.
  """

  SLOT: ClassVar[str] = "Rescale"
  FINAL: ClassVar[bool] = False
  RESIDUAL: ClassVar[str] = "rescalevit"
  COLOR: ClassVar[str] = "#D55E00"
  CALIBRATION_BATCHES: ClassVar[int] = 8
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
        updated = init_mean + (x.mean((0, 1)) - init_mean) / (count + 1)
        init_mean = jnp.where(calibrating, updated, init_mean)
        init_mean = jax.lax.stop_gradient(init_mean)
        self.init_mean.value = init_mean
        self.count.value = count + calibrating
      bias = jnp.where(calibrating, 0.01, 1.0) * bias
    return (x + (bias - init_mean)).astype(self.dtype)

  @staticmethod
  def num_stats_batches(options):
    return Rescale.CALIBRATION_BATCHES

  def is_per_token(self, train):
    return not train or self.is_settled(train)

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    calibrating = batch_stats["count"] < Rescale.CALIBRATION_BATCHES
    bias = np.where(calibrating, 0.01, 1.0) * params["bias"]
    return np.ones_like(bias), bias - batch_stats["init_mean"]
