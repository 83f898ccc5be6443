"""The processes of one run, on one machine or several."""

import atexit
import contextlib
import itertools
import logging
import math
import os
import re
import socket
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from rescalevit_jax import errors
from rescalevit_jax.runtime import compat

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_BEATS = 2.0
_SECONDS_TO_END = 10.0
_SILENCE = 30.0  # Seconds until a process counts as dead.
# JAX's own timeout, in case `_watch` cannot end this process. JAX may end it
# after half of this time already.
_JAX_SILENCE = 100
_BEATS = "rescalevit_jax/beats"
_END = "end"


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Join the processes of one run; called before devices are used.

  JAX detects missing arguments in the environment: of `srun`, of Open MPI's
  `mpirun`, of an indexed job of Kubernetes. With one process, nothing is
  joined, even in an allocation for several. If the other processes do not join
  within five minutes, JAX aborts this one.

  Args:
    coordinator: HOST:PORT of process 0; the port must be free there.
    num_processes: number of processes; 1: do not join.
    process_id: index of this process, from 0.

  Raises:
    UserError: an argument is missing or invalid.
  """
  given = (coordinator, num_processes, process_id)
  if num_processes == 1 or (given == (None,) * 3 and not _started_together()):
    return
  if coordinator is not None:
    _check_address(coordinator, process_id)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      local_device_ids=local_devices(),
      heartbeat_timeout_seconds=_JAX_SILENCE,
    )
  except (RuntimeError, TypeError, ValueError) as e:
    raise errors.UserError(
      f"cannot join the processes of this run ({errors.brief(e)}); give"
      " --coordinator, --num_processes and --process_id to each of them"
    ) from e
  state = compat.distributed_state()
  _log.info(
    "process %d of %d; process 0 is at %s",
    state.process_id,
    state.num_processes,
    state.coordinator_address,
  )
  ended = threading.Event()
  watch = threading.Thread(
    target=_watch,
    args=(state.client, state.process_id, state.num_processes, ended),
    daemon=True,
  )
  watch.start()

  # At exit, Python kills threads; inside JAX that aborts the process.
  @atexit.register
  def end_watch():
    ended.set()
    watch.join(_SECONDS_TO_END)


def local_devices() -> list[int] | None:
  """Return the indices of this process's GPUs among the visible ones.

  An empty list means all. None means JAX's default: under `srun` and `mpirun`,
  one GPU, selected by the process's index on its machine. The default leaves
  GPUs idle if a process has several. It fails if Slurm shows each process only
  its own GPU.
  """
  env = os.environ
  if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
    count = int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    index = int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
  else:
    count = len(env.get("SLURM_GTIDS", "0").split(","))
    index = int(env.get("SLURM_LOCALID", "0"))
  if count == 1:
    return []
  if not (visible := env.get("CUDA_VISIBLE_DEVICES")):
    return None
  gpus = len(visible.split(","))
  if gpus < count or gpus < int(env.get("SLURM_GPUS_ON_NODE", "0")):
    return []  # Those that Slurm gave to this process.
  return list(range(index * gpus // count, (index + 1) * gpus // count))


def _check_address(coordinator, process_id):
  """Raise UserError if the address would crash JAX."""
  match = re.fullmatch(r"(.+):(\d{1,5})", coordinator)
  if not match or not 0 < int(match[2]) < 2**16:
    raise errors.UserError(
      f"--coordinator: {coordinator!r} is not HOST:PORT; give one such as"
      " node0:12345"
    )
  try:
    socket.getaddrinfo(match[1].strip("[]"), None)
    if process_id == 0:
      with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("", int(match[2])))
  except OSError as e:
    raise errors.UserError(
      f"--coordinator: {coordinator} cannot be used ({e.strerror}); give a host"
      " that all processes reach, and a free port there"
    ) from e


def wait_for_all(name: str) -> None:
  """Wait until all processes reach the barrier of this name.

  A no-op for a single process.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _watch(client, index, count, ended):
  """End this process with an error if another one dies.

  A step would wait for the dead one forever.
  """
  beats, heard = {}, dict.fromkeys(range(count), time.monotonic())
  for beat in itertools.count():
    try:
      client.key_value_set(f"{_BEATS}/{index}", str(beat), allow_overwrite=True)
      found = client.key_value_dir_get(_BEATS)
    except jax.errors.JaxRuntimeError:
      return  # Process 0 has ended: JAX ends the others.
    for key, other in found:
      if beats.get(key) != other:
        beats[key] = other
        now = math.inf if other == _END else time.monotonic()
        heard[int(key.rpartition("/")[2])] = now
    silent = [i for i in heard if time.monotonic() - heard[i] > _SILENCE]
    if silent:
      if index == 0:  # The other processes still read its store.
        time.sleep(2 * _SECONDS_BETWEEN_BEATS)
      names = ", ".join(map(str, silent))
      print(
        f"error: process {names} of {count} has died: no heartbeat for"
        f" {_SILENCE:.0f} s; see its log, then start all processes again to"
        " resume from the last checkpoint",
        file=sys.stderr,
        flush=True,
      )
      os._exit(1)
    if ended.wait(_SECONDS_BETWEEN_BEATS):
      break
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    # The others may still be running.
    client.key_value_set(f"{_BEATS}/{index}", _END, allow_overwrite=True)


def _started_together():
  several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  if any(int(os.environ.get(name) or 1) > 1 for name in several):
    return True
  kubernetes = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
  return all(name in os.environ for name in kubernetes)
