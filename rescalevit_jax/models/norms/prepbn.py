"""PRepBN: a LayerNorm that becomes a BatchNorm during training."""

from typing import ClassVar

import flax.linen as nn

from rescalevit_jax.models.norms import batch_norm
from rescalevit_jax.models.norms import gradual


class PRepBN(gradual.Gradual, batch_norm.BatchNorm):
  """Progressive re-parameterized BatchNorm (SLAB, arXiv:2405.11582).

    y = lambda * LN(x) + (1 - lambda) * (BN(x) + eta * x)

  Guo et al. 2024 (ICML), as in their code: lambda falls linearly from 1 to 0 at
  all sites together, LN and BN have scales and biases of their own (`scale` and
  `bias` are LN's), and eta is one learned number per site that starts at 1.
  At lambda = 0 it is linear in evaluation. Their code evaluates with lambda = 0
  at any time, this one with the lambda of training.
  """

  SLOT: ClassVar[str] = "PRepBN"
  COLOR: ClassVar[str] = "#997700"

  def setup(self):
    super().setup()
    size = (self.features,)
    self.bn_scale = self.param("bn_scale", nn.initializers.ones, size)
    self.bn_bias = self.param("bn_bias", nn.initializers.zeros, size)
    self.eta = self.param("eta", nn.initializers.ones, (1,))

  def __call__(self, x, train):
    x = x.astype("float32")
    share = self.faded.value / gradual.FULL
    layer = self.standardize(x, (2,))[0] * self.scale + self.bias
    batch = self.normalize(x, train) * self.bn_scale + self.bn_bias
    y = (1 - share) * layer + share * (batch + self.eta * x)
    if train and not self.is_initializing():
      self.count_pass()
    return y.astype(self.dtype)

  @staticmethod
  def as_linear(params, batch_stats, epsilon):
    if batch_stats["faded"] != gradual.FULL:
      raise ValueError(
        "PRepBN folds only when lambda is 0; take the latest checkpoint of a"
        " finished run"
      )
    own = {"scale": params["bn_scale"], "bias": params["bn_bias"]}
    factor, shift = batch_norm.BatchNorm.as_linear(own, batch_stats, epsilon)
    return factor + params["eta"], shift
