"""Atomic writes: a file appears under its name only when it is complete."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Open a temporary file that replaces `path` on success.

  After an exception `path` is as before and the temporary file is gone.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Write a whole file, text as UTF-8.

  Characters without an encoding, as in odd file names, are escaped.
  """
  if isinstance(content, str):
    content = content.encode("utf-8", "backslashreplace")
  with replacing(path) as f:
    f.write(content)


def write_json(
  path: str | os.PathLike[str], value: Any, indent: int = 2
) -> None:
  """Write a value as JSON."""
  write(path, json.dumps(value, indent=indent) + "\n")


def remove_temporary(folder: pathlib.Path) -> None:
  """Remove the temporary files of killed processes from a folder."""
  for path in folder.glob(".*.tmp"):
    path.unlink(missing_ok=True)
