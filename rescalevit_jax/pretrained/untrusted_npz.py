"""Guards for reading `.npz` files that may come from anywhere.

Every size and type that a file declares is checked before memory is allocated.
No pickle is loaded, and the total size of the arrays is bounded.
"""

from collections.abc import Iterator
import contextlib
import io
import math
import os
import zipfile

import ml_dtypes
import numpy as np

from rescalevit_jax import errors

# Allowed beside several times the weights' own size, for a head of 21,843
# classes and a larger position embedding.
SLACK = 1 << 30

# zipfile reads the list of members at once; this has room for 30,000.
_MAX_READ = 1 << 22
_MAX_NAME = 255
_BFLOAT16 = np.dtype("V2")  # np.save stores bfloat16 as this dtype.


class Archive:
  """An open `.npz` file; `names` are its arrays.

  `max_bytes` limits the total size of the arrays, each counted as stored or as
  float32, whichever is larger.
  """

  def __init__(self, path: str, archive: zipfile.ZipFile, max_bytes: int):
    self._path = path
    self._archive = archive
    self._members = _members(path, archive)
    self._max_bytes = max_bytes
    self._bytes_left = max_bytes
    self.names = tuple(self._members)

  def read(self, name: str) -> np.ndarray:
    """Return an array; floats become float32, integers stay as stored."""
    member = self._members[name]
    with _one_line_errors(self._path, name):
      with self._archive.open(member) as stream:
        self._bytes_left -= _checked_size(stream, member)
        if self._bytes_left >= 0:
          return _read_array(stream)
    raise errors.UserError(
      f"{self._path}: array {name} exceeds the limit of"
      f" {self._max_bytes / 2**30:.1f} GiB for the arrays of such a model; get"
      " the right file"
    )


@contextlib.contextmanager
def open_archive(path: str, max_bytes: int | None = None) -> Iterator[Archive]:
  """Open an `.npz` file for reading.

  The limit of `Archive` is by default four times the file's size and `SLACK`.
  """
  with _open_file(path) as file, _open_zip(path, file) as archive:
    if max_bytes is None:
      max_bytes = 4 * os.fstat(file.fileno()).st_size + SLACK
    yield Archive(path, archive, max_bytes)


class _BoundedFile(io.BufferedReader):
  """A file that refuses large reads."""

  def read(self, size: int | None = -1) -> bytes:
    if size is None or size < 0:  # zipfile, when it searches for the end.
      size = _MAX_READ
    if size > _MAX_READ:
      raise ValueError(f"its list of members has {size} bytes, too many")
    return super().read(size)


def check_is_file(path: str) -> None:
  """Raise UserError unless there is such a file."""
  problem = None
  if not os.path.exists(path):
    problem = "no such file"
  elif not os.path.isfile(path):
    kind = "a folder" if os.path.isdir(path) else "not a file"
    problem = f"this is {kind}"
  if problem:
    raise errors.UserError(
      f"{path}: {problem}; give the path of an .npz checkpoint"
    )


def _open_file(path):
  check_is_file(path)
  with _one_line_errors(path):
    return _BoundedFile(io.FileIO(path))


def _open_zip(path, file):
  with _one_line_errors(path):
    start = file.read(6)
    if not start:
      raise ValueError("it is empty")
    if start == b"\x93NUMPY":
      raise ValueError("it is a single array (.npy)")
    if not zipfile.is_zipfile(file):
      cut = start.startswith(b"PK")
      raise ValueError("it is truncated" if cut else "it is not a zip archive")
    return zipfile.ZipFile(file)


@contextlib.contextmanager
def _one_line_errors(path, name=None):
  """Turn any exception of zipfile, zlib or numpy into a UserError."""
  problem = "not a readable .npz" if name is None else f"{name} cannot be read"
  try:
    yield
  except Exception as e:
    raise errors.UserError(
      f"{path}: {problem} ({errors.brief(e)}); get the file again"
    ) from e


def _members(path, archive):
  """Return the archive's members by array name."""
  members = {}
  for member in archive.infolist():
    name = member.filename.removesuffix(".npy")
    if len(name) > _MAX_NAME or not name.isprintable():
      raise errors.UserError(
        f"{path}: {name[:40]!r}... is not a valid array name; get the file"
        " again"
      )
    if name in members:
      raise errors.UserError(
        f"{path}: several arrays have the name {name}; get the file again"
      )
    members[name] = member
  return members


def _checked_size(stream, member):
  """Return the bytes of an array, or of its float32 copy if that is larger.

  Raises ValueError if the array is not numeric or its size is false.
  """
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError("its compression method is not one that numpy uses")
  try:
    version = np.lib.format.read_magic(stream)
  except ValueError as e:
    raise ValueError("it is not an array") from e
  if version != (1, 0):  # Others have long headers, which weights do not need.
    raise ValueError(f"it has version {version} of numpy's format")
  shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
  if dtype.kind not in "fiu" and dtype != _BFLOAT16:
    raise ValueError(f"its dtype is {dtype}, but weights are numbers")
  count = math.prod(shape)
  size = stream.tell() + count * dtype.itemsize
  if min(shape, default=0) < 0 or size != member.file_size:
    raise ValueError(
      f"it has {member.file_size} bytes, but {size} as an array {list(shape)}"
    )
  return count * max(dtype.itemsize, 4)


def _read_array(stream):
  """Return an array with a valid header; floats become float32."""
  stream.seek(0)
  array = np.lib.format.read_array(stream, allow_pickle=False)
  if array.dtype == _BFLOAT16:
    array = array.view(ml_dtypes.bfloat16)
  elif array.dtype.kind != "f":
    return array
  with np.errstate(over="ignore"):  # The loader checks for infinite values.
    return array.astype(np.float32, copy=False)
