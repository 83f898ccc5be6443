"""Norms that change gradually during training, and their schedules."""

import dataclasses
from typing import Any, Self

from flax import traverse_util
import jax.numpy as jnp
from jaxtyping import Array, Int
import ml_collections

from rescalevit_jax.models.norms import base

# `faded` counts from 0 to FULL. The EMA copies integers, so `faded` ends at
# exactly FULL with an EMA, too.
FULL = 2**16
_MEMORY = 100  # Length of the running means, in passes.


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of one or all sites, in training passes (micro-batches)."""

  begin: float  # Passes before the first site starts to fade.
  end: float  # Passes before the last site has faded.
  # Fraction of the time from begin to end that each site takes, in (0, 1].
  site_fraction: float

  def at_site(self, site: int, num_sites: int) -> Self:
    """Return the schedule of a site, from 0 to `num_sites - 1`, the last."""
    length = self.site_fraction * (self.end - self.begin)
    delay = (self.end - self.begin - length) * site / max(1, num_sites - 1)
    begin = self.begin + delay
    return dataclasses.replace(
      self, begin=begin, end=begin + length, site_fraction=1.0
    )

  def faded(self, passes: Int[Array, ""]) -> Int[Array, ""]:
    """Return the progress after this many passes, from 0 to FULL."""
    share = (passes - self.begin) / max(self.end - self.begin, 1.0)
    share = jnp.where(passes >= self.end, 1.0, jnp.clip(share, 0.0, 1.0))
    return jnp.round(FULL * share).astype(jnp.int32)


class Gradual(base.Norm):
  """A norm with the statistics `count` (of passes) and `faded` (progress).

  The model sets `schedule` to `config.norm_schedule.at_site(site, num_sites)`.
  Without a schedule and in evaluation, `faded` does not change.
  """

  schedule: Schedule | None = None

  def setup(self):
    super().setup()
    self.count, self.faded = (
      self.variable("batch_stats", name, jnp.zeros, (), jnp.int32)
      for name in ("count", "faded")
    )

  def count_pass(self):
    """Update both after a training pass."""
    self.count.value = self.count.value + 1
    if self.schedule is not None:
      faded = self.schedule.faded(self.count.value)
      self.faded.value = jnp.maximum(self.faded.value, faded)

  def is_per_token(self, train):
    return not train

  @staticmethod
  def create_schedule(
    config: ml_collections.ConfigDict, passes: int
  ) -> Schedule:
    """Return the schedule of all sites in a run of `passes` micro-batches."""
    # All sites together.
    return Schedule(config.fade.begin * passes, config.fade.end * passes, 1.0)

  @staticmethod
  def reset_counters(batch_stats: Any) -> Any:
    """Return a model's statistics with the counters of passes set to 0.

    This restarts the running means, except at sites that have faded.
    """
    flat = traverse_util.flatten_dict(batch_stats)
    for *site, name in list(flat):
      if name == "faded":
        flat[*site, "count"] = 0 * flat[*site, "count"]
    return traverse_util.unflatten_dict(flat)


def update_mean(mean: Array, value: Array, passes: Int[Array, ""]) -> Array:
  """Return a running mean after a pass with this value.

  `passes` includes this one. Up to 100 passes have equal weights.
  """
  momentum = jnp.maximum(1 / passes, 1 / _MEMORY)
  return mean + momentum * (value - mean)
