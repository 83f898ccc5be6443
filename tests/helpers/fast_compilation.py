"""Compile faster: fewer optimizations for the CPU, no tracebacks in programs.

Results differ only by rounding errors.
"""

import functools
import mmap
import os
import pathlib

import jax
import jaxlib

_FLAGS = (
  ("xla_backend_optimization_level", "0"),
  ("xla_cpu_use_fusion_emitters", "false"),
  ("xla_cpu_opt_preset", "FAST_COMPILE"),
  # By default XLA splits a program into 32 parts, which compile in parallel.
  ("xla_cpu_parallel_codegen_split_count", "1"),
)


@functools.cache
def flags() -> str:
  """Return flags for XLA_FLAGS.

  XLA aborts at an unknown flag, so search the library for each flag.
  """
  known = []
  for library in pathlib.Path(jaxlib.__file__).parent.glob("libjax_common.*"):
    with open(library, "rb") as f:
      with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        known += [x for x in _FLAGS if text.find(x[0].encode()) >= 0]
  return " ".join(f"--{name}={value}" for name, value in known)


def switch_on() -> None:
  """Configure this process and its children."""
  jax.config.update("jax_traceback_in_locations_limit", 0)
  os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
  given = os.environ.get("XLA_FLAGS", "")
  if flags() not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flags()}".strip()
