"""Checkpoint files: `.npz` archives with the keys of Google's ViT.

The keys are the paths of a parameter tree joined with '/', in the numbering of
the published checkpoints; statistics are under `batch_stats/`. Which of them a
model takes is `pretrained`'s affair.

A file may come from anywhere. What it says of itself is checked before it is
believed: no pickles, no sizes that the data do not have, bounded memory.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import io
import math
import os
import re
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.runtime import atomic_file

STATS = "batch_stats/"
BLOCK = re.compile(r"(Transformer/encoderblock_(\d+)/)([^/]+)(/.*)")
# Beside several times the weights' own size: a head of 21,843 classes, a larger
# grid of positions.
SLACK = 1 << 30

# zipfile reads an archive's list of members at once; this is room for 30,000.
_LONGEST_READ = 1 << 22
_LONGEST_NAME = 255

_PREFIXES = ("", "params/", "opt/target/", "optimizer/target/")
_BFLOAT16 = np.dtype("V2")  # What numpy makes of a saved bfloat16.
# Newer checkpoints count the modules of a block class by class.
_OLD_NUMBERING = {
  "LayerNorm_1": "LayerNorm_2",
  "MlpBlock_0": "MlpBlock_3",
  "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A file's content.

  Attributes:
    arrays: by key, without prefix and in the old numbering; float types are
      float32, integer types as stored.
    names: the name in the file of each of those keys.
    outside: names without the prefix of the weights (an optimizer's state);
      these arrays are not read.
  """

  arrays: dict[str, np.ndarray]
  names: dict[str, str]
  outside: tuple[str, ...]


def read(path: str, max_bytes: int | None = None) -> Checkpoint:
  """Reads a checkpoint; see `pretrained.load` for what it may look like.

  Args:
    path: of the file.
    max_bytes: how much the arrays may take, each counted as stored or as
      float32, whichever is larger. Half as much again is needed at most while
      one is converted. None: four times the file's size and `SLACK`.

  Raises:
    UserError: the file is missing, damaged, too large, or not a ViT checkpoint.
  """
  with _open(path) as file, _archive(path, file) as archive:
    if max_bytes is None:
      max_bytes = 4 * os.fstat(file.fileno()).st_size + SLACK
    members = _members(path, archive)
    prefix = _prefix(path, members)
    arrays, names, outside = {}, {}, []
    left = max_bytes
    for name, member in members.items():
      if not name.startswith((prefix, STATS)):
        outside.append(name)
        continue
      stats = STATS if name.startswith(STATS) else ""
      key = stats + _old_numbering(name.removeprefix(stats or prefix))
      if key in names:
        raise errors.UserError(
          f"{path}: holds {key} twice, as {names[key]} and {name}"
        )
      names[key] = name
      with _explained(path, name), archive.open(member) as stream:
        size = _check_header(stream, member)
        left -= size
        if left >= 0:
          arrays[key] = _array(stream)
      if left < 0:
        raise errors.UserError(
          f"{path}: {name} would take the arrays beyond"
          f" {max_bytes / 2**30:.1f} GiB, more than such a model's file can"
          " have; get the right file"
        )
  return Checkpoint(arrays, names, tuple(outside))


def write(path: str, arrays: Mapping[str, Any]) -> None:
  """Writes arrays under their keys; the file appears only when complete.

  Raises:
    UserError: the file cannot be written.
  """
  try:
    with atomic_file.replacing(path) as f:
      np.savez(f, **arrays)
  except OSError as e:
    raise errors.UserError(
      f"{path}: cannot be written ({e.strerror or e}); choose another place"
    ) from e


class _File(io.BufferedReader):
  """A file of which only small pieces can be read at once."""

  def read(self, size: int | None = -1) -> bytes:
    if size is None or size < 0:  # zipfile, where it looks for the end.
      size = _LONGEST_READ
    if size > _LONGEST_READ:
      raise ValueError(f"{size} bytes at once, such as for its list of members")
    return super().read(size)


def _open(path: str) -> io.BufferedReader:
  if not os.path.exists(path):
    raise errors.UserError(
      f"{path}: no such file; give the path of an .npz checkpoint"
    )
  if not os.path.isfile(path):
    kind = "a folder" if os.path.isdir(path) else "not a file"
    raise errors.UserError(
      f"{path}: this is {kind}; give the path of an .npz checkpoint"
    )
  with _explained(path):
    return _File(io.FileIO(path))


def _archive(path: str, file: io.BufferedReader) -> zipfile.ZipFile:
  with _explained(path):
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
def _explained(path: str, name: str | None = None) -> Iterator[None]:
  """Turns what a damaged archive can fail with, a dozen ways, into a line."""
  what = f"{path}: {name} cannot be read"
  if name is None:
    what = f"{path}: not a readable .npz"
  try:
    yield
  except Exception as e:
    raise errors.UserError(
      f"{what} ({errors.brief(e)}); get the file again"
    ) from e


def _members(path: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
  """Returns an archive's members by their names as keys."""
  members = {}
  for member in archive.infolist():
    name = member.filename.removesuffix(".npy")
    if len(name) > _LONGEST_NAME or not name.isprintable():
      raise errors.UserError(
        f"{path}: holds {name[:40]!r}..., which is no array's name; get the"
        " file again"
      )
    if name in members:
      raise errors.UserError(f"{path}: holds several arrays of one name")
    members[name] = member
  return members


def _check_header(stream: zipfile.ZipExtFile, member: zipfile.ZipInfo) -> int:
  """Checks what a member says of itself, before anything of it is allocated.

  Returns:
    The bytes of the array, or of the float32 one made of it if that is larger.

  Raises:
    ValueError: it is no array of numbers, or of another size.
  """
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError("it is packed in a way that numpy does not use")
  try:
    version = np.lib.format.read_magic(stream)
  except ValueError as e:
    raise ValueError("it is not an array") from e
  if version != (1, 0):  # Others are for long headers, which weights have not.
    raise ValueError(f"it is of version {version} of numpy's format")
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


def _array(stream: zipfile.ZipExtFile) -> np.ndarray:
  """Reads an array whose header is good; floats become float32."""
  stream.seek(0)
  array = np.lib.format.read_array(stream, allow_pickle=False)
  if array.dtype == _BFLOAT16:
    array = array.view(ml_dtypes.bfloat16)
  elif array.dtype.kind != "f":
    return array
  with np.errstate(over="ignore"):  # The loader looks for infinite values.
    return array.astype(np.float32, copy=False)


def _prefix(path: str, names: Collection[str]) -> str:
  """Returns the common prefix of the weights, such as 'params/' or ''."""
  anchor = "embedding/kernel"
  found = [
    name.removesuffix(anchor)
    for name in names
    if f"/{name}".endswith(f"/{anchor}")
  ]
  for prefix in _PREFIXES:
    if prefix in found:
      return prefix
  if len(found) == 1:
    return found[0]
  if found:
    raise errors.UserError(
      f"{path}: holds several models ({', '.join(sorted(found)[:3])}); keep"
      " one of them"
    )
  raise errors.UserError(
    f"{path}: not a ViT checkpoint in Google's naming: embedding/kernel is"
    f" not among its {len(names)} keys ({', '.join([*names][:3])})"
  )


def _old_numbering(key: str) -> str:
  match = BLOCK.fullmatch(key)
  if not match:
    return key
  block, _, slot, rest = match.groups()
  return block + _OLD_NUMBERING.get(slot, slot) + rest
