"""Startup does no unnecessary work before the first step."""

import subprocess
import sys

from rescalevit_jax import config as config_lib

PROGRAM = """
import os, sys
from rescalevit_jax import config, main
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.training import train, train_state

def at_first_step(writer):
  print(calls, *{name.partition(".")[0] for name in sys.modules})
  sys.stdout.flush()
  os._exit(0)  # Leaves the run as a kill would.

def init_state(*args, **kwargs):
  global calls
  calls += 1
  return original(*args, **kwargs)

calls, original = 0, train_state.init_state
train_state.init_state = init_state
metric_writers.MetricWriter.open = at_first_step
train.train_and_evaluate(config.from_json(sys.argv[1]), sys.argv[2])
"""

# Each import takes 0.1 s to 5 s.
NOT_NEEDED = {
  "array_record",
  "clu",
  "grain",
  "matplotlib",
  "pandas",
  "scipy",
  "sklearn",
  "tensorboard",
  "tensorflow",
  "torch",
}


def test_startup_imports_few_modules_and_traces_init_once(
  tiny_config, tmp_path
):
  result = subprocess.run(
    [
      sys.executable,
      "-c",
      PROGRAM,
      config_lib.to_json(tiny_config),
      str(tmp_path / "run"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  calls, *modules = result.stdout.split()
  assert "jax" in modules
  assert NOT_NEEDED.isdisjoint(modules)
  assert calls == "1"
