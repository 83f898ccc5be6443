"""Split the devices of a machine among concurrent runs."""

from collections.abc import Mapping
import logging
import os
import subprocess
import sys

from rescalevit_jax import errors

_log = logging.getLogger(__name__)

_CODE = "import jax; print(jax.default_backend(), jax.local_device_count())"


def find(jobs: int | None) -> list[dict[str, str]]:
  """Return the environment variables for each of `jobs` concurrent runs.

  None: one run per GPU, or one run without GPUs.
  """
  # A subprocess, since JAX would allocate memory on every GPU in this one.
  done = subprocess.run(
    [sys.executable, "-c", _CODE],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(f"JAX finds no devices: {reason}")
  backend, count = done.stdout.split()[-2:]
  return split(backend, int(count), jobs, os.environ)


def split(
  backend: str, count: int, jobs: int | None, environment: Mapping[str, str]
) -> list[dict[str, str]]:
  """Return the result of `find` for a known backend and device count."""
  if backend == "cpu":
    return [{} for _ in range(jobs or 1)]
  if backend != "gpu":
    if (jobs or 1) > 1:
      raise errors.UserError(
        f"--jobs: {jobs} processes cannot share a {backend.upper()}; use"
        " --jobs=1"
      )
    return [{}]
  jobs = jobs or count
  if jobs > count:
    raise errors.UserError(
      f"--jobs: {jobs} exceeds the number of GPUs ({count}); use --jobs={count}"
      " or less"
    )
  visible = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
  ids = visible.split(",") if visible else [str(i) for i in range(count)]
  share = count // jobs
  if count % jobs:
    _log.warning("%d of %d GPUs stay idle", count % jobs, count)
  return [
    {"CUDA_VISIBLE_DEVICES": ",".join(ids[i * share : (i + 1) * share])}
    for i in range(jobs)
  ]
