"""Store the results of `measure_gpu`: a JSON file per stage."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_reference
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.sweep import grid

STAGES = ("norms", "speed", "training")


class Results:
  """The results of all stages. Each is written as soon as it is known.

  Raises:
    UserError: a file is damaged, or the reference is of another model.
  """

  def __init__(self, plan: measure_plan.Plan, output: pathlib.Path):
    self._plan = plan
    self._output = output
    self.reference = _read_object(plan.reference)
    key = measure_reference.key(plan.config)
    if any(self.reference.get(name) != key[name] for name in key):
      raise errors.UserError(
        f"{plan.reference}: is not of {key}; compute it with --record_reference"
      )
    self._stages = {stage: self._read(stage) for stage in STAGES}
    self.machine = self._read("machine")

  def __getitem__(self, stage: str) -> Mapping[str, dict[str, Any]]:
    """Return the results of a stage, by name."""
    return self._stages[stage]

  def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and result of each measurement."""
    for results in self._stages.values():
      yield from results.items()

  def names(self, stage: str) -> list[str]:
    """Return the names of the planned measurements of a stage."""
    return list(getattr(self._plan, stage))

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
    """Write a result."""
    self._stages[stage][name] = found
    self._write(stage, self._stages[stage])

  def _read(self, name):
    path = self._output / f"{name}.json"
    return _read_object(path) if path.exists() else {}

  def _write(self, name, value):
    atomic_file.write_json(self._output / f"{name}.json", value, indent=1)


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


def read_bounds(path: pathlib.Path) -> list[dict[str, Any]]:
  """Return the rows of compiled.json.

  Raises:
    UserError: the file is damaged, or of several GPUs.
  """
  found = _read_json(path)
  rows = found.get("rows") if isinstance(found, dict) else None
  if not isinstance(rows, list) or not all(isinstance(x, dict) for x in rows):
    raise errors.UserError(
      f"--bounds: {path} has no rows; give compiled.json of --compile_for"
    )
  if (devices := found.get("devices", 1)) != 1:
    raise errors.UserError(
      f"--bounds: {path} is of {devices} GPUs; compile with --devices=1"
    )
  return rows


def _read_object(path):
  found = _read_json(path)
  if not isinstance(found, dict):
    raise errors.UserError(f"{path}: damaged (no JSON object); delete it")
  return found


def _read_json(path):
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e
