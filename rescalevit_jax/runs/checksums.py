"""SHA-256 checksums of a folder's files, in the format of sha256sum."""

import hashlib
import os
import pathlib

from rescalevit_jax import errors

NAME = "SHA256SUMS"


def write(folder: pathlib.Path) -> None:
  """Write the checksums of all files in subfolders; flush all files to disk.

  Afterwards the folder can be renamed to its final name.
  """
  lines = [
    f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n"
    for path in sorted(folder.glob("*/**/*"))
    if path.is_file()
  ]
  (folder / NAME).write_text("".join(lines), encoding="utf-8")
  for path in folder.glob("**/*"):
    if path.is_file():
      with open(path, "rb") as f:
        os.fsync(f.fileno())


def verify(folder: pathlib.Path) -> None:
  """Raise UserError unless there are checksums and all their files match."""
  try:
    if not (folder / NAME).is_file():  # Reading a pipe can block.
      raise ValueError
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    sums = [line.split("  ", 1) for line in lines]
    if not sums or any(len(pair) != 2 for pair in sums):
      raise ValueError
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{folder / NAME}: missing or damaged") from e
  for expected, name in sums:
    path = folder / name
    try:
      _check_is_own_file(folder, name)
      if _sum(path) != expected:
        raise errors.UserError(f"{path}: damaged, its SHA-256 differs")
    except OSError as e:
      raise errors.UserError(f"{path}: {e.strerror}") from e
    except (RuntimeError, ValueError) as e:  # A loop of links; a NUL byte.
      raise errors.UserError(
        f"{folder / NAME}: {name!r}: {errors.brief(e)}"
      ) from e


def _check_is_own_file(folder, name):
  """Raise UserError for files elsewhere, and for pipes, which can block."""
  path = folder / name
  if not path.resolve().is_relative_to(folder.resolve()):
    raise errors.UserError(f"{folder / NAME}: {name!r} is in another folder")
  if path.exists() and not path.is_file():
    raise errors.UserError(f"{path}: not a file; delete this checkpoint")


def _sum(path):
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
