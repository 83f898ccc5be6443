"""One process at a time trains in a run's folder."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import socket

import filelock

from rescalevit_jax import errors
from rescalevit_jax.runs import folder as folder_lib

_TIMEOUT_SECONDS = 0.2  # The last holder may be deleting the file just now.


@contextlib.contextmanager
def hold(workdir: str | pathlib.Path) -> Iterator[None]:
  """Hold the lock of a run's folder, WORKDIR/.lock.

  The folder is created if it is missing. The system releases the lock when the
  process ends, even if it is killed. Child processes do not inherit it. On exit
  the file is deleted, and so is a folder that was created here if it is empty.

  If another process holds the lock, raise UserError. If the file system has no
  locks or is not writable, there is no lock; the run reports failed writes
  itself.
  """
  workdir = pathlib.Path(workdir)
  created = not workdir.exists()
  lock = _acquire(workdir / folder_lib.LOCK)
  if lock is None:
    yield
    return
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # A disk that became read-only.
      os.unlink(lock.lock_file)  # The lock is still held.
    lock.release()
    if created:
      with contextlib.suppress(OSError):  # Usually not empty.
        workdir.rmdir()


def _acquire(path: pathlib.Path) -> filelock.BaseFileLock | None:
  lock = filelock.FileLock(
    path, _TIMEOUT_SECONDS, fallback_to_soft=False, poll_interval=0.02
  )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
  except filelock.Timeout as e:
    host, pid = "unknown host", "unknown"
    with contextlib.suppress(OSError, ValueError):  # Empty on a full disk.
      host, pid = path.read_text(errors="replace").split(" ")
    raise errors.UserError(
      f"{path.parent}: another process works on this run ({host}, process"
      f" {pid}); wait until it ends, stop it, or choose another --workdir"
    ) from e
  except OSError:
    with contextlib.suppress(OSError):  # The library leaves an empty file.
      path.unlink()
    return None
  with contextlib.suppress(OSError):  # A full disk can be locked too.
    path.write_text(f"{socket.gethostname()} {os.getpid()}")
  return lock
