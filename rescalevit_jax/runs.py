"""What lies in the folders of runs: configs, results and curves, read back."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_collections

from rescalevit_jax import errors
from rescalevit_jax import experiment


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, finished or not.

  Attributes:
    workdir: its folder.
    config: as run.
    result: what result.json says, None before the end.
    metrics: the lines of metrics.jsonl, in order of steps.
  """

  workdir: pathlib.Path
  config: ml_collections.ConfigDict
  result: dict[str, Any] | None
  metrics: list[dict[str, Any]]

  @property
  def step(self) -> int:
    """The last step that the metrics tell of."""
    return self.metrics[-1]["step"] if self.metrics else 0

  def curve(self, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a scalar, such as 'test/accuracy'."""
    lines = [line for line in self.metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def read(workdir: str | pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    UserError: there is no run, or a file of it is damaged.
  """
  workdir = pathlib.Path(workdir)
  config = experiment.read_config(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there (no config.json); give the folder of a run"
    )
  return Run(
    workdir, config, experiment.finished_result(workdir), _metrics(workdir)
  )


def find(folder: str | pathlib.Path) -> tuple[list[Run], list[str]]:
  """Reads all runs in a folder and below it, in order of their paths.

  Returns:
    The runs, and a line for each that cannot be read.

  Raises:
    UserError: there is no such folder, or no run in it.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.UserError(f"{folder}: no such folder; give one with runs")
  found, damaged = [], []
  for path in sorted(folder.rglob("config.json")):
    try:
      found.append(read(path.parent))
    except (errors.UserError, OSError) as e:
      damaged.append(str(e))
  if not found and not damaged:
    raise errors.UserError(f"{folder}: no runs there (no config.json)")
  return found, damaged


def _metrics(workdir):
  try:
    # A character that is none is part of a damaged line, left out below.
    text = (workdir / "metrics.jsonl").read_text("utf-8", errors="replace")
  except FileNotFoundError:
    return []
  lines = []
  for line in text.splitlines():
    try:
      value = json.loads(line)
      value["step"]
    except (KeyError, TypeError, ValueError):
      continue  # Being written just now, or cut off.
    lines.append(value)
  return lines
