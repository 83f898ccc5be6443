"""Start sweeps of tiny runs on the digits in subprocesses."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import subprocess
import sys
import time

import paths
import rare_gc

KEYS = (
  "model.patch_size=4",
  "model.hidden_size=16",
  "model.mlp_dim=32",
  "model.num_heads=2",
  "model.num_layers=1",
  "batch=48",
  "total_steps=40",
  "warmup_steps=3",
  "eval_every=10",
  "progress_every=2",
  "checkpoint_every=8",
)


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Return the environment of processes that start fast.

  They share a compilation cache. TensorFlow, whose import takes seconds, is
  hidden.
  """
  hidden = folder / "no_tensorflow"
  hidden.mkdir(exist_ok=True)
  (hidden / "tensorflow.py").write_text("raise ImportError('not here')\n")
  (hidden / "sitecustomize.py").write_text(rare_gc.CODE)
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_processes"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": os.pathsep.join([str(hidden), str(paths.ROOT)]),
  }


def start(
  runs_dir: pathlib.Path,
  *args: str,
  keys: Sequence[str],
  env: Mapping[str, str],
  config: str = "configs/quickstart.py",
) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "rescalevit_jax.sweep",
      *([f"--config={config}"] if config else []),
      f"--runs_dir={runs_dir}",
      *(f"--config.{key}" for key in keys),
      *args,
    ],
    cwd=paths.ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(runs_dir: pathlib.Path, *args: str, **kwargs):
  """Run a sweep to its end."""
  process = start(runs_dir, *args, **kwargs)
  stdout, stderr = process.communicate(timeout=300)
  return subprocess.CompletedProcess(
    process.args, process.returncode, stdout, stderr
  )


def replace_command(monkeypatch, code: str, *args: str) -> None:
  """Replace all planned runs by Python code, given their folder and `args`."""
  monkeypatch.setattr(
    "rescalevit_jax.sweep.grid.PlannedRun.command",
    property(lambda run: [sys.executable, "-c", code, str(run.workdir), *args]),
  )


def wait_for(condition, process: subprocess.Popen | None = None):
  """Wait until a condition holds; fail if the process ends first."""
  deadline = time.monotonic() + 300
  while not condition():
    assert time.monotonic() < deadline
    if process is not None and process.poll() is not None:
      raise AssertionError(process.communicate())
    time.sleep(0.02)


def is_under_way(workdir: pathlib.Path) -> bool:
  """Return True if a run has written metrics."""
  path = workdir / "metrics.jsonl"
  return path.exists() and path.stat().st_size > 0


def processes_of(folder: pathlib.Path) -> list[int]:
  """Return the processes with a folder in their command line."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if os.fsencode(folder) in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      continue  # The process has just ended.
  return found
