"""Norms that change gradually during training, and their schedules."""

import dataclasses
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
from jaxtyping import Array, Int

from rescalevit_jax.models.norms import traits

# `faded` counts from 0 to FULL. An average of the weights leaves integers
# unchanged, so it ends at exactly FULL.
FULL = 2**16
_MEMORY = 100  # Length of the running means, in passes.


@dataclasses.dataclass(frozen=True)
class SiteSchedule:
  """The schedule of one site, in training passes (micro-batches).

  Attributes:
    begin: number of passes before it starts to fade.
    end: number of passes before it has faded.
  """

  begin: float
  end: float

  def faded(self, passes: Int[Array, ""]) -> Int[Array, ""]:
    """Return the progress after this many passes, from 0 to FULL."""
    share = (passes - self.begin) / max(self.end - self.begin, 1.0)
    share = jnp.where(passes >= self.end, 1.0, jnp.clip(share, 0.0, 1.0))
    return jnp.round(FULL * share).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of all sites, from the first one to the final norm.

  Attributes:
    begin: number of passes before the first site starts to fade.
    end: number of passes before the last site has faded.
    site_fraction: fraction of the time from begin to end that each site takes,
      in (0, 1]; 1: all sites fade together.
  """

  begin: float
  end: float
  site_fraction: float

  def at_site(self, site: int, num_sites: int) -> SiteSchedule:
    """Return the schedule of a site, numbered from 0."""
    return SiteSchedule(*self.span(site, num_sites))

  def span(self, site: int, num_sites: int) -> tuple[float, float]:
    """Return begin and end of a site."""
    length = self.site_fraction * (self.end - self.begin)
    delay = (self.end - self.begin - length) * site / max(1, num_sites - 1)
    begin = self.begin + delay
    return begin, begin + length


class Gradual(traits.Scheduled):
  """A norm with the statistics `count` (of passes) and `faded` (progress).

  Without a schedule and in evaluation they do not change.
  """

  schedule: SiteSchedule | None = None

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
  def create_schedule(config, passes):
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
  """Return a running mean after a pass.

  Args:
    mean: before the pass.
    value: of the pass.
    passes: number of passes including this one; the mean of up to 100 passes is
      their average.
  """
  momentum = jnp.maximum(1 / passes, 1 / _MEMORY)
  return mean + momentum * (value - mean)
