"""Choose the order of runs under a time limit, by their measured speeds."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import pathlib
import time
from typing import Any, TypeVar

from rescalevit_jax import errors
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import subprocess_run

SECONDS_TO_START = 40.0  # Upper bound for a run's start, without compilation.
_SECONDS_TO_SAVE = 20.0  # Time that a stopped run needs.
_MIN_TIMED_STEPS = 50  # Calibration makes the first steps slow.

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class TimeLimit:
  """A time limit for several runs, on the clock of `time.monotonic`."""

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

    `seconds` estimates the duration of an item. None if it is too late to start
    any.
    """
    left = self.stop_times[0] - time.monotonic()
    if left < SECONDS_TO_START:
      return None
    return next((item for item in items if seconds(item) < left), items[0])


class Chooser:
  """Chooses the run with the most value per minute that ends in time.

  The n-th seed of a recipe has the value 1/n. A run's duration is computed from
  its own seconds per step, once measured, or scaled from the measured run with
  the nearest FLOPs per step. Before any measurement, FLOPs replace durations,
  and no run is expected to end in time.
  """

  def __init__(self, runs: Sequence[grid.PlannedRun], limit: TimeLimit):
    self._runs, self._limit = runs, limit
    self._rank: dict[pathlib.Path, int] = {}  # Of a run among its seeds.
    seeds: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for run in runs:
      recipe = run_reader.recipe(run.config)
      seeds[recipe] += 1
      self._rank[run.workdir] = seeds[recipe]

  def __call__(
    self, waiting: Sequence[grid.PlannedRun]
  ) -> grid.PlannedRun | None:
    """Return the run to start; None if it is too late to start any."""
    paces = {run.workdir: pace(run) for run in self._runs}
    measured = [run for run in self._runs if paces[run.workdir]]

    def cost(run):
      """Return the seconds left, or the FLOPs before any measurement."""
      steps = run.config.total_steps - subprocess_run.saved_step(run.workdir)
      nearest = min(
        measured,
        key=lambda other: abs(math.log(other.step_flops / run.step_flops)),
        default=None,
      )
      if nearest is None:
        return steps * run.step_flops
      speed = paces[nearest.workdir] / nearest.step_flops
      return steps * (paces[run.workdir] or run.step_flops * speed)

    def seconds(run):
      return cost(run) + SECONDS_TO_START if measured else math.inf

    def cost_per_value(run):
      return cost(run) * self._rank[run.workdir]

    return self._limit.choose(sorted(waiting, key=cost_per_value), seconds)


def pace(run: grid.PlannedRun) -> float | None:
  """Return the seconds per step of a run so far, with its evaluations.

  None without a result or a checkpoint of enough steps. Compilation does not
  count. An evaluated image takes a third of the time of a training image, as
  its FLOPs do.
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
  except (*errors.DAMAGED_JSON, OSError, errors.UserError):
    return None
