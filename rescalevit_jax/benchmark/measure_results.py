"""Store the results of `measure_gpu`: a JSON file per stage, and a summary."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_reference
from rescalevit_jax.benchmark import measure_report
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.sweep import grid

STAGES = ("norms", "speed", "training")


class Results:
  """The results of all stages. Each is written as soon as it is known.

  Args:
    plan: the planned measurements.
    output: existing folder of the results.
    bounds: compiled.json of the lower bounds, or None.

  Raises:
    UserError: a file is damaged, or the reference is of another model.
  """

  def __init__(
    self,
    plan: measure_plan.Plan,
    output: pathlib.Path,
    bounds: pathlib.Path | None,
  ):
    self._plan = plan
    self._output = output
    self._bounds = _read_bounds(bounds) if bounds else []
    self.reference = _read_json(plan.reference)
    key = measure_reference.key(plan.norms[0])
    if any(self.reference.get(name) != key[name] for name in key):
      raise errors.UserError(
        f"{plan.reference}: is not of {key}; compute it with --record_reference"
      )
    self._stages = {
      stage: _read_json(self._path(stage), {}) for stage in STAGES
    }
    self.machine = _read_json(self._path("machine"), None)

  def __getitem__(self, stage: str) -> Mapping[str, dict[str, Any]]:
    """Return the results of a stage, by name."""
    return self._stages[stage]

  def __iter__(self) -> Iterator[dict[str, Any]]:
    """Yield the results of all stages."""
    for results in self._stages.values():
      yield from results.values()

  def names(self, stage: str) -> Mapping[str, Any]:
    """Return the planned measurements of a stage, by name."""
    planned: dict[str, Mapping[str, Any]] = {
      "norms": self._plan.norms[1],
      "speed": self._plan.speed,
      "training": self._plan.training,
    }
    return planned[stage]

  def left(self, stage: str) -> list[str]:
    """Return the names of unfinished measurements, failed ones last."""
    results = self[stage]
    names = [x for x in self.names(stage) if not is_done(results.get(x))]
    return sorted(names, key=lambda name: "error" in results.get(name, {}))

  def state(self, stage: str) -> str:
    """Return the number of finished and of failed measurements, as text."""
    results = self[stage].values()
    done = sum(map(is_done, results))
    failed = sum("error" in x for x in results)
    return f"{done} of {len(self.names(stage))} done, {failed} failed"

  def set_machine(self, machine: dict[str, Any]) -> None:
    """Write the description of the machine."""
    self.machine = machine
    self._write("machine", machine)

  def store(self, stage: str, name: str, found: dict[str, Any]) -> None:
    """Write a result and the summary."""
    self._stages[stage][name] = found
    self._write(stage, self._stages[stage])
    self.write_summary()

  def write_summary(self) -> None:
    """Write summary.md."""
    speed = self["speed"]
    text = measure_report.markdown(
      self.machine,
      {stage: self.state(stage) for stage in STAGES},
      self._plan.norms[1],
      self["norms"],
      self.reference,
      [
        {"run": run, "subject": subject, "rounds": [speed[name]]}
        for name, (run, subject) in self._plan.speed.items()
        if is_done(speed.get(name))
      ],
      self._bounds,
      self._plan.training,
      self["training"],
      {
        name: x.get("error") or x["left_out"]
        for results in self._stages.values()
        for name, x in results.items()
        if "error" in x or "left_out" in x
      },
    )
    atomic_file.write(self._output / "summary.md", text)

  def _path(self, name):
    return self._output / f"{name}.json"

  def _write(self, name, value):
    atomic_file.write(self._path(name), json.dumps(value, indent=1) + "\n")


def is_done(found: Mapping[str, Any] | None) -> bool:
  """Return True if a result needs no further measurement."""
  return (
    found is not None
    and not {"error", "left_out"} & found.keys()
    and found.get("finished", True)
  )


def of_training(run: grid.PlannedRun) -> dict[str, Any]:
  """Return the progress of a training run, with its evaluations."""
  try:
    found = run_reader.read(run.workdir)
  except errors.UserError:  # It has not started.
    return {"finished": False, "step": 0}
  steps, accuracy = found.curve("test/accuracy")
  return {
    "finished": found.is_finished,
    "step": found.step,
    "evaluations": {
      "step": steps,
      "accuracy": accuracy,
      "loss": found.curve("test/loss")[1],
    },
    **(found.result or {}),
  }


def _read_bounds(path):
  try:
    found = _read_json(path)
    if (devices := found.get("devices", 1)) != 1:
      raise errors.UserError(
        f"--bounds: {path} is of {devices} GPUs; compile with --devices=1"
      )
    return found["rows"]
  except (AttributeError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"--bounds: {path} has no rows; give compiled.json of --compile_for"
    ) from e


_REQUIRED = object()


def _read_json(path, default=_REQUIRED):
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if default is _REQUIRED:
      raise
    return default
  except ValueError as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e
