"""Choose the runs of a sweep that has a time limit, by their measured rates."""

import collections
from collections.abc import Callable, Hashable, Sequence
import dataclasses
import json
import math
import time
from typing import TypeVar

from rescalevit_jax import errors
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import schedule
from rescalevit_jax.sweep import subprocess_run

SECONDS_TO_START = 40.0  # Upper bound for a run's start, without compilation.
_SECONDS_TO_SAVE = 20.0  # Time that a stopped run needs.
_MIN_TIMED_STEPS = 50  # Calibration makes the first steps slow.

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class TimeLimit:
  """A limit for the time of several runs.

  Attributes:
    end: the end, as a time of `time.monotonic`.
  """

  end: float

  @property
  def stop_times(self) -> tuple[float, float]:
    """The times at which runs save and stop, and at which they are killed."""
    stop = self.end - _SECONDS_TO_SAVE
    return stop, stop + 0.7 * _SECONDS_TO_SAVE

  def choose(
    self, items: Sequence[_T], seconds: Callable[[_T], float]
  ) -> _T | None:
    """Return the first item that ends in time, or the first if none does.

    Args:
      items: at least one item, the most valuable first.
      seconds: function from an item to its estimated duration.

    Returns:
      The item; None if it is too late to start any.
    """
    left = self.stop_times[0] - time.monotonic()
    if left < SECONDS_TO_START:
      return None
    return next((item for item in items if seconds(item) < left), items[0])


class Chooser:
  """Chooses the run with the most value per minute that ends in time.

  The n-th seed of a recipe has the value 1/n. Durations follow from the
  measured seconds per step: of the run itself, else in proportion of the run
  with the nearest FLOPs per step. Before any measurement, FLOPs replace
  durations and no run is known to end in time.

  Args:
    runs: all runs of the sweep, in order.
    limit: the time limit.
  """

  def __init__(self, runs: Sequence[grid.PlannedRun], limit: TimeLimit):
    self._runs, self._limit = runs, limit
    self._flops = {run.workdir: schedule.step_flops(run) for run in runs}
    counts: collections.Counter[Hashable] = collections.Counter()
    self._value = {}
    for run in runs:
      recipe = run_reader.recipe(run.config)
      counts[recipe] += 1
      self._value[run.workdir] = 1 / counts[recipe]

  def __call__(
    self, waiting: Sequence[grid.PlannedRun]
  ) -> grid.PlannedRun | None:
    """Return the run to start; None if it is too late to start any."""
    paces = {run.workdir: pace(run) for run in self._runs}
    measured = {k: x / self._flops[k] for k, x in paces.items() if x}

    def seconds_or_flops(run):
      flops = self._flops[run.workdir]
      nearest = min(
        measured,
        key=lambda k: abs(math.log(self._flops[k] / flops)),
        default=None,
      )
      per_step = paces[run.workdir] or flops * measured.get(nearest, 1.0)
      done = subprocess_run.saved_step(run.workdir)
      return per_step * (run.config.total_steps - done)

    cost = {run.workdir: seconds_or_flops(run) for run in waiting}
    return self._limit.choose(
      sorted(
        waiting, key=lambda run: cost[run.workdir] / self._value[run.workdir]
      ),
      lambda run: (
        cost[run.workdir] + SECONDS_TO_START if measured else math.inf
      ),
    )


def pace(run: grid.PlannedRun) -> float | None:
  """Return the seconds per step of a run so far, with its evaluations.

  The time of a step is measured without compilation. An evaluated image takes a
  third of the time of a training image, as its FLOPs do.

  Returns:
    The seconds; None without a result or a checkpoint of enough steps.
  """
  config = run.config
  try:
    found = result_lib.read(run.workdir)
    if result_lib.is_finished(found):
      seconds = config.batch / found["images_per_second"]
    else:
      step = max(folder.saved_steps(run.workdir, "last"))
      path = folder.checkpoints(run.workdir, "last") / str(step)
      found = json.loads((path / "progress" / "metadata").read_text("utf-8"))
      if found["timed_steps"] < _MIN_TIMED_STEPS:
        return None
      seconds = found["timed_seconds"] / found["timed_steps"]
    evaluated = found["examples_evaluated"] / config.eval_every
    return seconds * (1 + evaluated / (3 * config.batch))
  except (
    ArithmeticError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    errors.UserError,
  ):
    return None
