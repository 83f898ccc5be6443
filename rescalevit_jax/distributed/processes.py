"""The processes of one run, on one machine or on many."""

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
_SILENCE = 30.0  # Seconds, after which a process is taken for dead.
# When JAX ends this process if the watch below does not, or cannot. JAX's own
# beats are half of this apart: it can come as soon as that after a death.
_JAX_SILENCE = 100
_BEATS = "rescalevit_jax/beats"
_END = "end"


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of one run; called before the devices are used.

  What is not given comes from the environment, as JAX finds it: of the tasks of
  one `srun`, of Open MPI's `mpirun`, of an indexed job of Kubernetes. A process
  that was started alone stays alone, even if there is place for more in the
  allocation around it.

  Args:
    coordinator: HOST:PORT of process 0, which must be free there.
    num_processes: how many there are; 1 leaves this one alone.
    process_id: which one this is, from 0 on.

  If the others do not come within five minutes, JAX aborts this process.

  Raises:
    UserError: something is missing or wrong.
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
      heartbeat_timeout_seconds=_JAX_SILENCE,
    )
  except (RuntimeError, TypeError, ValueError) as e:
    raise errors.UserError(
      f"cannot join the processes of this run ({errors.brief(e)}); give"
      " --coordinator, --num_processes and --process_id to each of them"
    ) from e
  state = compat.distributed_state()
  _log.info(
    "process %d of %d; process 0, their leader, is at %s",
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

  # Python ends threads by force, which aborts the process if one is in JAX.
  @atexit.register
  def end_watch():
    ended.set()
    watch.join(_SECONDS_TO_END)


def _check_address(coordinator, process_id):
  """Raises UserError where JAX would crash."""
  match = re.fullmatch(r"(.+):(\d{1,5})", coordinator)
  if not match or not 0 < int(match[2]) < 2**16:
    raise errors.UserError(
      f"--coordinator: is {coordinator!r}, but must be HOST:PORT, such as"
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
      " that all know, and a port that is free there"
    ) from e


def wait_for_all(what: str) -> None:
  """Waits until all processes have come to the place in the code that is named.

  Does nothing where there is only one.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _watch(client, index, count, ended):
  """Ends this process with an error when another one falls silent.

  A step waits for all of them, without end if one is dead.
  """
  beats, heard = {}, dict.fromkeys(range(count), time.monotonic())
  for beat in itertools.count():
    try:
      client.key_value_set(f"{_BEATS}/{index}", str(beat), allow_overwrite=True)
      found = client.key_value_dir_get(_BEATS)
    except jax.errors.JaxRuntimeError:
      return  # Process 0 is gone, or all is over: JAX ends what is left.
    for key, other in found:
      if beats.get(key) != other:
        beats[key] = other
        now = math.inf if other == _END else time.monotonic()
        heard[int(key.rpartition("/")[2])] = now
    silent = [i for i in heard if time.monotonic() - heard[i] > _SILENCE]
    if silent:
      if index == 0:  # Where the beats are, which others still read.
        time.sleep(2 * _SECONDS_BETWEEN_BEATS)
      names = ", ".join(map(str, silent))
      print(
        f"error: of {count} processes, {names} is missing: silent for"
        f" {_SILENCE:.0f} s; see its own log, then start all of them again: the"
        " run goes on from its last checkpoint",
        file=sys.stderr,
        flush=True,
      )
      os._exit(1)
    if ended.wait(_SECONDS_BETWEEN_BEATS):
      break
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    # Others may take their time.
    client.key_value_set(f"{_BEATS}/{index}", _END, allow_overwrite=True)


def _started_together():
  several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  if any(int(os.environ.get(name, "1")) > 1 for name in several):
    return True
  kubernetes = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
  return all(name in os.environ for name in kubernetes)
