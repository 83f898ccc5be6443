"""Check that an input is read or refused with a one-line error.

Time and memory are limited. Writing elsewhere and new processes are errors.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import resource
import sys
import time
import types

from rescalevit_jax import errors

SECONDS = 20.0  # Generous, for a busy machine.
# Address space beyond the current use. Targets reduce larger limits of the code
# under test.
BYTES = 1 << 30

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = re.compile(
  r"os\.(exec|fork|posix_spawn|spawn|system|startfile|mkdir|rename|remove|rmdir"
  r"|link|symlink|truncate|chmod|chown)|subprocess\.|shutil\.|socket\.connect"
  r"|pickle\."
)
_watched: pathlib.Path | None = None  # The only writable folder.
_forbidden: list[str] = []


class Guilty(AssertionError):
  """An input caused a forbidden outcome."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
  """Limit the process to `BYTES` of additional address space."""
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = pages * resource.getpagesize() + BYTES
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def judge(
  target: types.ModuleType, content: bytes, folder: pathlib.Path
) -> str:
  """Run a target on a file; call it within `limited`.

  Args:
    target: module with `build` and `run`.
    content: content of the file.
    folder: folder for the file `input`.

  Returns:
    'read', or the error message without names and numbers.

  Raises:
    Guilty: the outcome is not allowed.
  """
  global _watched
  path = folder / "input"
  path.write_bytes(content)
  _forbidden.clear()
  error = None
  begin = time.monotonic()
  try:
    _watched = folder
    target.run(path)
  except Exception as e:
    error = e
  finally:
    _watched = None
  seconds = time.monotonic() - begin
  if seconds > SECONDS:
    raise Guilty(f"took {seconds:.1f} s")
  if _forbidden:
    raise Guilty(f"did what no reader may: {_forbidden[0]}")
  if error is None:
    return "read"
  if not isinstance(error, errors.UserError):
    raise Guilty(f"not a UserError: {type(error).__name__}: {error}") from error
  cause = error
  while cause is not None:
    if isinstance(cause, MemoryError):
      raise Guilty(f"asked for more than {BYTES} bytes") from error
    cause = cause.__cause__ or cause.__context__
  message = str(error)
  if len(message.splitlines()) != 1 or len(message) > 2000:
    raise Guilty(f"not one line of moderate length: {message!r:.3000}")
  message = message.replace(str(folder), "")
  names = r"'[^']*'|\"[^\"]*\"|\S*/\S*|-?\d[\w.]*"
  return re.sub(names, "#", message)[:100]


def _audit(event, args):
  if _watched is None:
    return
  if event == "open":
    path, _, flags = args
    inside = isinstance(path, str) and path.startswith(f"{_watched}/")
    if isinstance(flags, int) and flags & _WRITES and not inside:
      _forbidden.append(f"open {path!r} for writing")
  elif _FORBIDDEN.match(event):
    if not any(str(arg).startswith(f"{_watched}/") for arg in args[:1]):
      _forbidden.append(f"{event}{args!r}")


sys.dont_write_bytecode = True  # Late imports would write .pyc files.
sys.addaudithook(_audit)
