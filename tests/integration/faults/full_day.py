r"""Test for leaks of memory, open files and threads in a long run.

  PYTHONPATH=.:tests/helpers python tests/integration/faults/full_day.py \
      --checkpoints=2000

One process writes metrics to metrics.jsonl and TensorBoard at each step, a
checkpoint every ten steps, and evaluates every hundred. Its memory, open files
and threads are printed.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time

import tiny_sweep
import trials

from rescalevit_jax.data import dataset
from rescalevit_jax.runs import folder as folder_lib

_STEPS = 10  # Steps per checkpoint.
# Allowed growth from the second to the last third: MiB, and MiB per checkpoint.
# Per checkpoint, Tensorstore 0.1.86 leaks 0.07 MiB of counters; per line of
# metrics, TensorFlow 2.21 leaks 4 KiB. A leaked state would take 0.3 MiB.
_MORE_MEMORY = 10
_MORE_A_CHECKPOINT = 0.2
_MORE_FILES = 2
_MORE_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Sample:
  """Resources of a process at one time.

  Attributes:
    checkpoints: number of checkpoints written.
    memory: resident memory in MiB.
    files: number of open files.
    threads: number of threads.
  """

  checkpoints: int
  memory: float
  files: int
  threads: int


def watch(
  folder: pathlib.Path,
  data_dir: pathlib.Path,
  checkpoints: int,
  env: Mapping[str, str],
) -> list[Sample]:
  """Train, and sample the process's resources twenty times.

  Raises:
    AssertionError: memory, open files or threads grow, or the run fails.
  """
  steps = checkpoints * _STEPS
  keys = (
    *tiny_sweep.KEYS,
    "model.hidden_size=64",
    "model.mlp_dim=128",
    f"tfds_data_dir={data_dir}",
    f"total_steps={steps}",
    f"checkpoint_every={_STEPS}",
    "progress_every=1",
    "eval_every=100",
  )
  trial = trials.Trial(folder / "run", folder / "log", keys, env)
  process = trial.start()
  samples = []
  try:
    for i in range(1, 20):
      wanted = checkpoints * i // 20
      while process.poll() is None and _written(trial) < wanted:
        time.sleep(0.05)
      samples.append(_sample(process.pid, _written(trial)))
      print(*dataclasses.astuple(samples[-1]), flush=True)
    assert process.wait() == 0, trial.said()
  finally:
    process.kill()
    process.wait()
  assert trial.metrics().count(b"train/loss") == steps
  _check_level(samples)
  return samples


def main(argv: Sequence[str] | None = None) -> None:
  """Train for a number of checkpoints and print the resources."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoints", type=int, default=2000)
  args = parser.parse_args(argv)
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    data_dir = folder / "tfds"
    dataset.load("digits", str(data_dir))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    print("checkpoints, MiB, open files, threads")
    watch(folder, data_dir, args.checkpoints, env)
  print(f"level; {time.monotonic() - start:.0f} s")


def _written(trial):
  return max(folder_lib.saved_steps(trial.workdir, "last"), default=0) // _STEPS


def _sample(pid, checkpoints):
  process = pathlib.Path("/proc", str(pid))
  status = dict(
    line.split(":", 1) for line in (process / "status").read_text().splitlines()
  )
  return Sample(
    checkpoints,
    round(int(status["VmRSS"].split()[0]) / 1024, 1),
    len(os.listdir(process / "fd")),
    int(status["Threads"]),
  )


def _check_level(samples):
  """Compare medians, because garbage and pending checkpoints fluctuate."""
  third = len(samples) // 3
  middle, end = (
    {
      name: statistics.median(getattr(sample, name) for sample in part)
      for name in ("checkpoints", "memory", "files", "threads")
    }
    for part in (samples[third : 2 * third], samples[-third:])
  )
  print("middle", middle, "end", end)
  more = {name: end[name] - middle[name] for name in end}
  allowed = _MORE_MEMORY + _MORE_A_CHECKPOINT * more["checkpoints"]
  assert more["memory"] <= allowed, more
  assert more["files"] <= _MORE_FILES, more
  assert more["threads"] <= _MORE_THREADS, more


if __name__ == "__main__":
  main()
