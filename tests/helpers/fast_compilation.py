"""Compile faster: fewer optimizations for the CPU, no tracebacks in programs.

Results differ only by rounding errors.
"""

import os
import subprocess
import sys

import jax

_FLAGS = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_opt_preset=FAST_COMPILE",
  # By default XLA splits a program into 32 parts, which compile in parallel.
  "--xla_cpu_parallel_codegen_split_count=1",
)


def switch_on() -> None:
  """Configure this process and its children."""
  jax.config.update("jax_traceback_in_locations_limit", 0)
  os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
  given = os.environ.get("XLA_FLAGS", "")
  if _FLAGS[0] not in given:  # A worker inherits them.
    os.environ["XLA_FLAGS"] = " ".join([given, *_known_flags()]).strip()


def _known_flags():
  """Return the flags that this version of XLA knows.

  XLA aborts at an unknown flag, so try them in other processes.
  """
  if _accepts(_FLAGS):
    return _FLAGS
  return [flag for flag in _FLAGS if _accepts([flag])]


def _accepts(flags):
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
  done = subprocess.run(
    command, env=env, stderr=subprocess.DEVNULL, timeout=300
  )
  return done.returncode == 0
