"""Describe the hardware and the software of a measurement."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from rescalevit_jax import errors

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm")
_COUNT_DEVICES = (
  "import jax; print(jax.device_count(), 'x', jax.devices()[0].device_kind)"
)


def environment() -> dict[str, str]:
  """Return the environment of measured processes: one GPU, no caches."""
  variables = dict(os.environ)
  variables.pop("JAX_COMPILATION_CACHE_DIR", None)
  variables["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
  gpus = variables.get("CUDA_VISIBLE_DEVICES") or "0"
  variables["CUDA_VISIBLE_DEVICES"] = gpus.partition(",")[0]
  return variables


def describe() -> dict[str, Any]:
  """Return the devices, the processor and the versions.

  Raises:
    UserError: JAX finds no devices.
  """
  # A subprocess, since JAX allocates memory on every GPU.
  done = subprocess.run(
    [sys.executable, "-c", _COUNT_DEVICES],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(f"JAX finds no devices: {reason}")
  kind = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text(errors="replace").splitlines()
    names = [x.partition(": ")[2] for x in lines if x.startswith("model name")]
    kind = (names or [kind])[0]
  versions = {"python": platform.python_version()}
  for package in _PACKAGES:
    if importlib.util.find_spec(package) is not None:
      versions[package] = importlib.metadata.version(package)
  return {
    "devices": done.stdout.strip().splitlines()[-1],
    "processor": kind,
    "cores": len(os.sched_getaffinity(0)),
    "versions": versions,
  }
