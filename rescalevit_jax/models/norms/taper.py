"""TaperNorm: a norm that becomes a learned linear map during training."""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import traits


@dataclasses.dataclass(frozen=True)
class Schedule(gradual.Schedule):
  """The schedule, and the anchor loss of the final norm."""

  final: bool = True  # True if the final norm tapers, too.
  anchor: float = 0.0  # Weight of the anchor loss.
  # Range of the tokens in statistics and anchor loss: the head's inputs at the
  # final norm, all tokens at other sites.
  tokens: tuple[int, int | None] = (0, None)

  def at_site(self, site, num_sites):
    own = super().at_site(site, num_sites)
    if site < num_sites - 1:
      return dataclasses.replace(own, anchor=0.0, tokens=(0, None))
    if not self.final:
      return Schedule(2.0**31, 2.0**31, 1.0)  # Never.
    return own


class TaperLN(gradual.Gradual, traits.Foldable):
  """TaperNorm from LayerNorm (Kanavalau et al. 2026, arXiv:2602.10408).

    z = x - mean
    y = g * scale * z / sigma + (1 - g) * c * (gain + change) * z + bias

  The gate g = (1 + cos(pi t)) / 2 falls from 1 to 0 while t rises from 0 to 1,
  at all sites together. While g is 1, `gain` is a copy of `scale`, and c is the
  least-squares fit of the second term to the first,

    c = E[|scale * z|^2 / sigma] / E[|scale * z|^2],

  with running means E over tokens. Afterwards both are constant. `change` is
  learned and starts at 0, so gain + change is the paper's second gain.

  If the final norm tapers, the training loss contains the anchor loss
  weight * E[(sigma - target)^2], where `target` is the mean of sigma while g is
  1. At the final norm, E is over the tokens that the head sees.

  The formula follows the paper's abstract and summaries by others.
  """

  SLOT: ClassVar[str] = "TaperLN"
  COLOR: ClassVar[str] = "#6699CC"
  CENTERED: ClassVar[bool] = True

  def setup(self):
    super().setup()
    size = (self.features,)
    self.scale = self.param("scale", nn.initializers.ones, size)
    self.change = self.param("change", nn.initializers.zeros, size)
    if self.CENTERED:
      self.bias = self.param("bias", nn.initializers.zeros, size)
    self.gain = self.variable("batch_stats", "gain", jnp.ones, size)
    self.dividend, self.divisor, self.target = (
      self.variable("batch_stats", name, jnp.zeros, ())
      for name in ("dividend", "divisor", "target")
    )

  def __call__(self, x, train):
    x = x.astype(jnp.float32)
    z = x - x.mean(-1, keepdims=True) if self.CENTERED else x
    var = jnp.square(z).mean(-1, keepdims=True) + self.options.epsilon
    own, share = jax.lax.rsqrt(var), self.faded.value / gradual.FULL
    gate = jnp.where(share < 1, (1 + jnp.cos(math.pi * share)) / 2, 0.0)
    c = self.dividend.value / jnp.maximum(self.divisor.value, 1e-30)
    linear = (1 - gate) * c * (self.gain.value + self.change)
    y = z * (gate * own * self.scale + linear)
    if self.CENTERED:
      y += self.bias
    if train and not self.is_initializing():
      of = slice(*(self.schedule.tokens if self.schedule else (0, None)))
      self._add_anchor_loss(jnp.sqrt(var[:, of]))
      seen = z[:, of], own[:, of], self.scale
      self._update(*jax.lax.stop_gradient(seen))
    return y.astype(self.dtype)

  def _add_anchor_loss(self, sigma):
    if self.schedule is None or not self.schedule.anchor:
      return
    loss = jnp.square(sigma - self.target.value).mean()
    weight = jnp.where(self.faded.value > 0, self.schedule.anchor, 0.0)
    self.sow(traits.LOSSES, "anchor", weight * loss)

  def _update(self, z, own, scale):
    """Update the statistics while the gate is 1, and the gate."""
    energy = jnp.square(scale * z).sum(-1, keepdims=True)
    passes, begun = self.count.value + 1, self.faded.value > 0
    for mean, value in (
      (self.dividend, energy * own),
      (self.divisor, energy),
      (self.target, 1 / own),
    ):
      new = gradual.update_mean(mean.value, value.mean(), passes)
      mean.value = jnp.where(begun, mean.value, new)
    self.gain.value = jnp.where(begun, self.gain.value, scale)
    self.count_pass()

  @classmethod
  def as_linear(cls, params, batch_stats, epsilon):
    if batch_stats["faded"] != gradual.FULL:
      raise ValueError(
        f"{cls.__name__} folds only after it has tapered; take the latest"
        " checkpoint of a finished run with taper.final=True"
      )
    c = batch_stats["dividend"] / batch_stats["divisor"]
    factor = c * (batch_stats["gain"] + params["change"])
    return factor, params.get("bias", 0 * factor)

  @staticmethod
  def create_schedule(config, passes):
    return Schedule(
      config.fade.begin * passes,
      config.fade.end * passes,
      1.0,
      config.taper.final,
      config.taper.anchor,
      (0, 1) if config.model.pool == "cls" else (1, None),
    )


class TaperRMS(TaperLN):
  """TaperNorm from RMSNorm: z = x, without bias; see `TaperLN`."""

  SLOT: ClassVar[str] = "TaperRMS"
  COLOR: ClassVar[str] = "#994455"
  CENTERED: ClassVar[bool] = False
