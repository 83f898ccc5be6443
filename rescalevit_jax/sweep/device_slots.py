"""Shares out the devices of a machine among runs at the same time."""

from collections.abc import Mapping
import logging
import os
import subprocess
import sys

from rescalevit_jax import errors

_log = logging.getLogger(__name__)

_LOOK = "import jax; print(jax.default_backend(), jax.local_device_count())"


def find(jobs: int | None) -> list[dict[str, str]]:
  """Returns a place for each run at a time: the variables to start it with.

  Args:
    jobs: how many; None for one a GPU, or one without GPUs.

  Raises:
    UserError: the devices are too few, or JAX does not find any.
  """
  # A look from this process would take memory of every GPU.
  done = subprocess.run(
    [sys.executable, "-c", _LOOK], capture_output=True, text=True, check=False
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(f"JAX finds no devices: {reason}")
  backend, count = done.stdout.split()[-2:]
  return share_out(backend, int(count), jobs, os.environ)


def share_out(
  backend: str, count: int, jobs: int | None, environment: Mapping[str, str]
) -> list[dict[str, str]]:
  """Does what `find` does, for devices that are known.

  Args:
    backend: JAX's name of it: 'cpu', 'gpu' or 'tpu'.
    count: devices that JAX sees.
    jobs: as in `find`.
    environment: of this process.
  """
  if backend == "cpu":
    return [{} for _ in range(jobs or 1)]
  if backend != "gpu":
    if (jobs or 1) > 1:
      raise errors.UserError(
        f"--jobs is {jobs}, but one process at a time can use a"
        f" {backend.upper()}; use --jobs=1"
      )
    return [{}]
  jobs = jobs or count
  if jobs > count:
    raise errors.UserError(
      f"--jobs is {jobs}, but there are {count} GPUs to share; use --jobs"
      f" {count} or fewer"
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
