"""BatchNorm, also with another one inside the MLP."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import traits


class BatchNorm(layer_norm.Affine, traits.RunningStatistics, traits.Foldable):
  """Normalize each channel over batch and tokens.

  Ioffe & Szegedy 2015 (arXiv:1502.03167). Training normalizes with the
  statistics of the global batch and updates the running mean and variance.
  Evaluation normalizes with the running statistics. The running variance is
  unbiased, as in PyTorch and unlike in `flax.linen.BatchNorm`.
  """

  COLOR: ClassVar[str] = "#E69F00"

  def setup(self):
    super().setup()
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
    self.var = self.variable("batch_stats", "var", jnp.ones, self.features)

  def normalize(self, x, train):
    if not train:
      scale = jax.lax.rsqrt(self.var.value + self.options.epsilon)
      return (x - self.mean.value) * scale
    y, mean, var = self.standardize(x, (0, 1))
    if not self.is_initializing():
      count = x.shape[0] * x.shape[1]
      unbiased = var[0, 0] * count / (count - 1)
      old = self.options.momentum
      self.mean.value = old * self.mean.value + (1 - old) * mean[0, 0]
      self.var.value = old * self.var.value + (1 - old) * unbiased
    return y

  def is_per_token(self, train):
    return not train

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    factor = params["scale"] / np.sqrt(batch_stats["var"] + epsilon)
    return factor, params["bias"] - factor * batch_stats["mean"]

  @staticmethod
  def num_stats_batches(options):
    # The initial statistics then have a weight of 0.9^48 = 0.006.
    return max(1, round(48 * math.log(0.9, max(options.momentum, 1e-9))))


class BatchNorm2(BatchNorm):
  """BatchNorm with another one inside the MLP, before the GELU.

  Yao et al. 2021 (Leveraging Batch Normalization for Vision Transformers, ICCV
  Workshops): otherwise the hidden layer of the MLP is not normalized, and
  training sometimes diverges.
  """

  COLOR: ClassVar[str] = "#999933"
  IN_MLP: ClassVar[str | None] = "BatchNorm_1"
