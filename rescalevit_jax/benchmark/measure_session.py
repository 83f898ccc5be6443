"""Run the measurements of `measure_gpu` within a time limit."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import logging
import math
import pathlib
import subprocess
import threading
import time

from rescalevit_jax import errors
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import machine as machine_lib
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_report
from rescalevit_jax.benchmark import measure_results
from rescalevit_jax.benchmark import norm_steps
from rescalevit_jax.benchmark import peers
from rescalevit_jax.benchmark import run_worker
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import local_scheduler
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.sweep import time_limit
from rescalevit_jax.training import experiment

_log = logging.getLogger(__name__)

# Share of the remaining time that a stage may use, to leave time for the next
# stage. The last stage may use all of it.
_SHARES = {"norms": 0.35, "speed": 0.5}
_TEST_IMAGES = 10_000  # CIFAR's test split; used until the dataset is read.
_OVERTIME = 30.0  # Seconds that the last measurement of a stage may overrun.
_SECONDS_BETWEEN_WRITES = 20.0  # Of a training run's progress.


def _device_and_jax(machine):
  return f"{machine['devices']} with jax {machine['versions'].get('jax')}"


class Session:
  """One call of `measure_gpu`, with a time limit in seconds."""

  def __init__(
    self,
    plan: measure_plan.Plan,
    output: pathlib.Path,
    seconds: float,
    bounds: pathlib.Path | None,
  ):
    self._plan = plan
    self._output = output
    self._end = time.monotonic() + seconds
    self._bounds = measure_results.read_bounds(bounds) if bounds else []
    self._results = measure_results.Results(plan, output)
    self._test_images: dict[str, int] = {}
    self._data_problems: dict[str, str | None] = {}

  def run(self, stages: Sequence[str], needs_gpu: bool) -> int:
    """Measure the unfinished items of some stages; return the exit code."""
    results = self._results
    machine = machine_lib.describe()
    if needs_gpu and machine["devices"].endswith(" cpu"):
      raise errors.UserError(
        "JAX sees no GPU; pip install 'jax[cuda13]', or try --rehearse"
      )
    if not results.machine:
      results.set_machine(machine)
    before, now = map(_device_and_jax, (results.machine, machine))
    if before != now:
      raise errors.UserError(
        f"--output: {self._output} has measurements of {before}, this is {now};"
        " choose another folder"
      )
    measure: dict[str, Callable[[list[str], float], None]] = {
      "norms": self._measure_norms,
      "speed": self._measure_speed,
      "training": self._train,
    }
    for stage in stages:
      share = 1.0 if stage == stages[-1] else _SHARES[stage]
      left = results.left(stage)
      _log.info(
        "%s: %d of %d left, at most %s of the remaining %s",
        stage,
        len(left),
        len(results.names(stage)),
        terminal.duration(share * self._seconds()),
        terminal.duration(self._seconds()),
      )
      measure[stage](left, time.monotonic() + share * self._seconds())
    self._write_summary()
    for stage in measure_results.STAGES:
      _log.info("%s: %s", stage, results.state(stage))
    _log.info("see %s", self._output / "summary.md")
    found = [x for _, x in results.items()]
    return int(any("error" in x or x.get("within") is False for x in found))

  def _measure_norms(self, names, stop):
    items = self._plan.norms

    def record(name, found):
      item = items[name]
      reference = self._results.reference["norms"].get(item["norm"])
      if item["kind"] == "check" and reference and "error" not in found:
        found |= measure_report.compare(found, reference, item["dtype"])
      self._record("norms", name, found, stop)

    norm_steps.run(
      self._plan.config,
      {name: items[name] for name in names},
      stop - time.monotonic(),
      self._most_seconds(stop),
      record,
    )

  def _measure_speed(self, names, stop):
    for name in names:
      run, subject = self._plan.speed[name]
      taken = [x.get("seconds", 0.0) for x in self._results["speed"].values()]
      if not peers.is_installed(subject):
        found = {"left_out": f"{subject} is not installed"}
      elif problem := self._data_problem(run):
        found = {"error": problem}
      elif time.monotonic() + max(taken, default=0.0) > stop:
        return
      else:
        found = self._measure_program(run, subject, stop)
      self._record("speed", name, found, stop)

  def _measure_program(self, run, subject, stop):
    start = time.monotonic()
    try:
      found = run_worker.measure(
        run, subject, self._plan.speed_options, self._most_seconds(stop)
      )
    except subprocess.TimeoutExpired:
      return {"error": norm_steps.OUT_OF_TIME}
    except errors.UserError as e:
      return {"error": str(e)}
    return {**found, "seconds": time.monotonic() - start}

  def _train(self, names, stop):
    limit, names = time_limit.TimeLimit(stop), list(names)
    while names:
      seconds = {name: self._run_seconds(name) for name in names}
      if (name := limit.choose(names, seconds.__getitem__)) is None:
        return
      names.remove(name)
      run = self._plan.training[name]
      if problem := self._data_problem(run):
        self._record("training", name, {"error": problem}, stop)
        continue
      if math.isfinite(seconds[name]):
        _log.info("%s: about %s", name, terminal.duration(seconds[name]))
      # The result of an earlier call, whose checkpoints may be lost.
      before = self._results["training"].get(name, {})
      store = functools.partial(self._store_run, name, before)
      with _repeating(store):
        outcome = local_scheduler.LocalScheduler(
          [run], [], [{}], limit.stop_times
        ).run()
      found = store()
      if outcome.failed:
        found["error"] = outcome.failed[0][1]
      self._record("training", name, found, stop)
      if outcome.stopped:
        return

  def _store_run(self, name, before):
    """Store and return the progress of a run."""
    found = measure_results.of_training(self._plan.training[name])
    if found["step"] < before.get("step", 0):
      found = before
    found.pop("error", None)
    self._store("training", name, found)
    return found

  def _run_seconds(self, name):
    """Return an estimate of a run's remaining time; inf if unknown."""
    run = self._plan.training[name]
    ours = (
      self._results["speed"].get(other_name, {})
      for other_name, (other, subject) in self._plan.speed.items()
      if subject == "ours"
      and comparison.same_but(run, other, "model.norm", "dataset")
    )
    found = next((x for x in ours if "step_seconds" in x), None)
    if found is None:
      return math.inf
    steps = run.config.total_steps - subprocess_run.saved_step(run.workdir)
    images = self._test_images.get(run.config.dataset, _TEST_IMAGES)
    evaluation = images / found["eval_images_per_second"]
    return (
      time_limit.SECONDS_TO_START
      + 2 * found["compile_seconds"]
      + steps * found["step_seconds"]
      + -(-steps // run.config.eval_every) * evaluation
    )

  def _data_problem(self, run):
    """Return why a run's dataset cannot be loaded, or None."""
    name = run.config.dataset
    if name not in self._data_problems:
      self._data_problems[name] = None
      try:
        # Fills the cache of decoded images for all runs.
        dataset = experiment.load_dataset(run.config)
        self._test_images[name] = len(dataset.test)
      except (errors.UserError, OSError) as e:
        self._data_problems[name] = str(e)
    return self._data_problems[name]

  def _seconds(self) -> float:
    return max(0.0, self._end - time.monotonic())

  def _most_seconds(self, stop) -> float:
    """Return the timeout of a measurement, which may hang."""
    return min(self._seconds(), stop + _OVERTIME - time.monotonic())

  def _store(self, stage, name, found):
    self._results.store(stage, name, found)
    self._write_summary()

  def _write_summary(self):
    text = measure_report.markdown(self._plan, self._results, self._bounds)
    atomic_file.write(self._output / "summary.md", text)

  def _record(self, stage, name, found, stop):
    """Store and log a result."""
    self._store(stage, name, found)
    total = len(self._results.names(stage))
    _log.info(
      "%s %d/%d  %s: %s  (%s left for this stage)",
      stage,
      total - len(self._results.left(stage)),
      total,
      name,
      measure_report.brief(found),
      terminal.duration(max(0.0, stop - time.monotonic())),
    )


@contextlib.contextmanager
def _repeating(function):
  """Call a function periodically while a block runs."""
  ended = threading.Event()

  def repeat():
    while not ended.wait(_SECONDS_BETWEEN_WRITES):
      function()

  thread = threading.Thread(target=repeat)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
