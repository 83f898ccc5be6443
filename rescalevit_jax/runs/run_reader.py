"""Read the folders of runs: configs, results, metrics."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import result as result_lib

LOG_HEADER = "--- "  # First line of each process in log.txt.
_TAIL_BYTES = 65_536  # More than a line of metrics with diagnostics.
_IDENTIFYING_KEYS = [
  name
  for name, key in keys.KEYS.items()
  if name != "seed" and not key.resumable
]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run."""

  workdir: pathlib.Path
  config: ml_collections.ConfigDict
  result: dict[str, Any] | None  # None if neither finished nor diverged.
  metrics: list[dict[str, Any]]  # Lines of metrics.jsonl, in order of steps.

  @property
  def is_finished(self) -> bool:
    """True if the run has reached its last step."""
    return result_lib.is_finished(self.result)

  @property
  def step(self) -> int:
    """The last step in the result, or in the metrics if there is no result."""
    result = self.result or {}
    if step := result.get("last_step", result.get("step")):
      return step
    return self.metrics[-1]["step"] if self.metrics else 0

  def curve(self, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a scalar, such as 'test/accuracy'."""
    lines = [x for x in self.metrics if isinstance(x.get(name), int | float)]
    return [line["step"] for line in lines], [line[name] for line in lines]


@dataclasses.dataclass(frozen=True)
class Found:
  """The runs in a folder, and a line for each that cannot be read."""

  runs: list[Run]  # Sorted by path.
  damaged: list[str]  # Runs, and folders that cannot be listed.
  not_begun: list[str]  # Runs of a sweep that failed before writing a config.


def read(workdir: str | pathlib.Path) -> Run:
  """Read a run's folder."""
  workdir = pathlib.Path(workdir)
  config = folder_lib.require_config(workdir)
  return Run(workdir, config, result_lib.read(workdir), read_metrics(workdir))


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Return the lines of a run's metrics.jsonl, [] without the file."""
  try:
    # An invalid character belongs to a damaged line, which is omitted.
    text = (workdir / folder_lib.METRICS).read_text("utf-8", errors="replace")
  except FileNotFoundError:
    return []
  return parse_metrics(text.splitlines())


def parse_metrics(lines: Iterable[str]) -> list[dict[str, Any]]:
  """Parse lines of metrics.jsonl; skip those that a kill cut off."""
  parsed = []
  for line in lines:
    with contextlib.suppress(*errors.DAMAGED_JSON):
      value = json.loads(line)
      if isinstance(value["step"], int):
        parsed.append(value)
  return parsed


def find(folder: str | pathlib.Path) -> Found:
  """Read each run in a folder and its subfolders once, following links."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.UserError(f"{folder}: no such folder; give one with runs")
  runs: list[Run] = []
  damaged: list[str] = []
  not_begun: list[str] = []
  for workdir, files in _folders(folder, damaged):
    if folder_lib.CONFIG in files:
      try:
        runs.append(read(workdir))
      except (errors.UserError, OSError) as e:
        damaged.append(str(e))
    elif workdir != folder and _is_log(workdir / folder_lib.LOG):
      last = last_log_line(workdir)
      reason = "" if last.startswith(LOG_HEADER) else f": {last}"
      not_begun.append(f"{workdir}{reason}")
  if not (runs or damaged or not_begun):
    raise errors.UserError(
      f"{folder}: no runs there (no {folder_lib.CONFIG}); give one with runs"
    )
  runs.sort(key=lambda run: run.workdir)
  return Found(runs, sorted(damaged), sorted(not_begun))


def find_each(folders: Iterable[str | pathlib.Path]) -> list[Run]:
  """Read all runs in several folders; report unreadable ones on stderr."""
  runs: dict[pathlib.Path, Run] = {}
  others: dict[str, None] = {}
  for folder in folders:
    found = find(folder)
    runs |= {run.workdir.resolve(): run for run in found.runs}
    others |= dict.fromkeys((*found.damaged, *found.not_begun))
  for line in others:
    print(f"left out: {line}", file=sys.stderr)
  return list(runs.values())


def group(runs: Iterable[Run]) -> list[tuple[Run, ...]]:
  """Group runs that differ only in the seed and in resumable keys."""
  groups: dict[tuple[Any, ...], list[Run]] = {}
  for run in runs:
    groups.setdefault(recipe(run.config), []).append(run)
  return [
    tuple(sorted(group, key=lambda run: (run.config.seed, run.workdir)))
    for group in groups.values()
  ]


def recipe(config: ml_collections.ConfigDict) -> tuple[Any, ...]:
  """Return the values of all keys except the seed and resumable ones."""
  values = config_lib.flatten(config)
  return tuple(values[key] for key in _IDENTIFYING_KEYS)


def varied_keys(configs: Sequence[ml_collections.ConfigDict]) -> list[str]:
  """Return the differing keys of configs, without seed and resumable ones."""
  flat = [config_lib.flatten(config) for config in configs]
  return [
    key
    for key in _IDENTIFYING_KEYS
    if any(f[key] != flat[0][key] for f in flat)
  ]


def last_log_line(workdir: pathlib.Path) -> str:
  """Return the last line of log.txt, '' if there is none."""
  lines = tail(workdir / folder_lib.LOG)
  return lines[-1] if lines else ""


def tail(path: pathlib.Path) -> list[str]:
  """Return the last non-empty lines of a file, [] if it cannot be read."""
  try:
    with open(path, "rb") as f:
      size = f.seek(0, os.SEEK_END)
      f.seek(max(0, size - _TAIL_BYTES))
      text = f.read().decode(errors="replace")
  except OSError:
    return []
  return [line.strip() for line in text.splitlines() if line.strip()]


def _folders(
  top: pathlib.Path, damaged: list[str]
) -> Iterator[tuple[pathlib.Path, list[str]]]:
  """Yield each folder once, with the names of its files.

  Paths without links come first. Folders that cannot be listed are added to
  `damaged`.
  """

  def note(error):
    damaged.append(f"{error.filename}: cannot be listed ({error.strerror})")

  seen, waiting = set(), [top]
  while waiting:
    for name, folders, files in os.walk(waiting.pop(0), onerror=note):
      real = os.path.realpath(name)
      folders[:] = sorted(set(folders) - {folder_lib.CHECKPOINTS})
      if real in seen:
        folders.clear()
        continue
      seen.add(real)
      parent = pathlib.Path(name)
      waiting += [p for p in map(parent.joinpath, folders) if p.is_symlink()]
      yield parent, files


def _is_log(path):
  """Return whether a sweep wrote this file."""
  try:
    with open(path, "rb") as f:
      return f.read(len(LOG_HEADER)) == LOG_HEADER.encode()
  except OSError:
    return False
