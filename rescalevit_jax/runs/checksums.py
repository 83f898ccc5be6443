"""SHA-256 sums of a folder's files, so that damage is noticed.

The file of sums has the form of the command sha256sum, which can check it too.
"""

import hashlib
import os
import pathlib

from rescalevit_jax import errors

NAME = "SHA256SUMS"


def write(folder: pathlib.Path) -> None:
  """Writes the sums of all files in the folders of a folder.

  Then all of it is on the disk, whatever happens to the machine: the folder can
  be given the name by which others know that it is whole.
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
  """Checks all files against their sums.

  Raises:
    UserError: a file, or the file of sums, is missing or differs.
  """
  try:
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    sums = [line.split("  ", 1) for line in lines]
    if not sums or any(len(pair) != 2 for pair in sums):
      raise ValueError
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{folder / NAME}: missing or damaged") from e
  for expected, name in sums:
    # Not of files elsewhere, such as one without an end in /dev.
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
      raise errors.UserError(f"{folder / NAME}: names {name!r}, elsewhere")
    try:
      if _sum(folder / name) != expected:
        raise errors.UserError(f"{folder / name}: damaged, its SHA-256 differs")
    except OSError as e:
      raise errors.UserError(f"{folder / name}: {e.strerror}") from e


def _sum(path):
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
