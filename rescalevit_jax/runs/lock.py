"""One process at a time works on a run's folder."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import socket

from rescalevit_jax import errors

_TRIES = 100


@contextlib.contextmanager
def hold(workdir: str | pathlib.Path) -> Iterator[None]:
  """Holds the lock of a run's folder, which is made if it is not there.

  The lock is WORKDIR/.lock. The system releases it when the process ends,
  however that happens, and programs that the process starts do not inherit it.
  Afterwards the file is gone, and so is the folder if it was made here and
  nothing was written to it.
  Where the file system has no locks or cannot be written to, or the folder does
  not stay, there is none: the run itself says what it cannot write.

  Args:
    workdir: the run's folder.

  Raises:
    UserError: another process holds the lock.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / ".lock"
  made = not workdir.exists()
  descriptor = _acquire(path)
  if descriptor is None:
    yield
    return
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # As on a disk that became read-only.
      path.unlink()  # Still locked: `_acquire` counts on that.
    os.close(descriptor)
    if made:
      with contextlib.suppress(OSError):  # Not empty, as a rule.
        workdir.rmdir()


def _acquire(path: pathlib.Path) -> int | None:
  for _ in range(_TRIES):
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
      return None
    try:
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
      continue  # Another process has just left, and its empty folder with it.
    except OSError:
      return None
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_same_file(descriptor, path):
        with contextlib.suppress(OSError):  # A full disk can be locked too.
          os.ftruncate(descriptor, 0)
          os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())
        return descriptor
    except BlockingIOError as e:
      host, _, pid = os.read(descriptor, 1000).decode().partition(" ")
      os.close(descriptor)
      raise errors.UserError(
        f"{path.parent}: another process works on this run"
        f" ({host or 'unknown host'}, process {pid or 'unknown'}); wait for its"
        " end, or stop it, or choose another --workdir"
      ) from e
    except OSError:
      if not os.fstat(descriptor).st_size:  # Nobody's: made just now.
        with contextlib.suppress(OSError):
          path.unlink()
      os.close(descriptor)
      return None
    os.close(descriptor)  # Its last holder has just deleted the file.
  return None


def _is_same_file(descriptor, path):
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False
