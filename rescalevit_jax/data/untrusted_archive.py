"""Guards for official CIFAR archives that may come from anywhere."""

from collections.abc import Mapping, Sequence
import dataclasses
import gzip
import os
import tarfile
from typing import Any

import numpy as np

from rescalevit_jax import errors

_PIXELS = 3 * 32 * 32  # Bytes of a record after its labels.
_MAX_TEXT = 1 << 16  # Bytes; the official texts have less than 2 KB.
_MAX_HEADERS = 1 << 18  # Bytes between the contents of two members.


@dataclasses.dataclass(frozen=True)
class Layout:
  """The content of an official binary archive, all in one folder.

  Attributes:
    dataset: name of the dataset in tfds.
    records: number of images in each file of records.
    num_classes: number of classes for each label byte of a record, in order.
    names: number of class names in each text file, one per line.
    optional: other files that may be present.
  """

  dataset: str
  archive: str
  folder: str
  records: Mapping[str, int]
  num_classes: tuple[int, ...]
  names: Mapping[str, int]
  optional: tuple[str, ...] = ()

  @property
  def record_bytes(self) -> int:
    """Size of one record."""
    return len(self.num_classes) + _PIXELS

  @property
  def max_bytes(self) -> int:
    """Maximum size of the archive, compressed or not."""
    files = len(self.records) + len(self.names) + len(self.optional)
    records = sum(self.records.values()) * self.record_bytes
    return records + files * (_MAX_TEXT + _MAX_HEADERS)


LAYOUTS = (
  Layout(
    dataset="cifar10",
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    records={
      **{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
      "test_batch.bin": 10_000,
    },
    num_classes=(10,),
    names={"batches.meta.txt": 10},
    optional=("readme.html",),
  ),
  Layout(
    dataset="cifar100",
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    records={"train.bin": 50_000, "test.bin": 10_000},
    num_classes=(20, 100),
    names={"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
  ),
)


def check(path: str, layouts: Sequence[Layout]) -> Layout:
  """Return an archive's layout; raise UserError unless it is an official one.

  The archive must be a gzip-compressed tar file with exactly the members of one
  of the layouts. Kinds, sizes and labels are checked, and nothing is written.
  Memory is bounded by twice the largest file of records and a few MB.
  """
  try:
    if os.path.getsize(path) > max(layout.max_bytes for layout in layouts):
      raise ValueError("it is larger than any of them")
    with gzip.open(path) as unzipped:
      file: Any = _BudgetFile(unzipped)  # tarfile only calls read.
      with tarfile.open(fileobj=file, mode="r|") as tar:
        layout = _check_members(path, file, tar, layouts)
      # Read to the end, where gzip compares its checksum.
      if any(unzipped.read(_MAX_TEXT)) or unzipped.read(1):
        raise errors.UserError(
          f"{path}: data follow the tar file; {_use_official(layouts)}"
        )
      return layout
  except errors.UserError:
    raise
  except Exception as e:  # gzip, zlib and tarfile raise many types.
    reason = getattr(e, "strerror", None) or " ".join(str(e).split())
    raise errors.UserError(
      f"{path}: not an intact gzip-compressed tar file ({reason});"
      f" {_use_official(layouts)}"
    ) from e


class _BudgetFile:
  """A file that limits the bytes read for each member.

  A few bytes of gzip may expand to gigabytes, and tarfile reads some headers
  as a whole.
  """

  def __init__(self, file: gzip.GzipFile):
    self._file = file
    self.allow(0)

  def allow(self, content: int) -> None:
    """Allow the content of one member, and headers."""
    self._left = content + _MAX_HEADERS

  def read(self, size: int) -> bytes:
    data = self._file.read(size)
    self._left -= len(data)
    if self._left < 0:
      raise ValueError("a member is larger than expected")
    return data


def _use_official(layouts):
  return f"use the published {' or '.join(x.archive for x in layouts)}"


def _check_members(path, file, tar, layouts):
  layout, seen = None, set()
  while member := tar.next():
    folder, _, name = member.name.partition("/")
    layout = layout or next((x for x in layouts if x.folder == folder), None)
    where = f"{path}: {member.name[:99]!r}"
    if layout is None or folder != layout.folder:
      raise errors.UserError(
        f"{where} is not in the official archive; {_use_official(layouts)}"
      )
    problem = _member_problem(file, tar, member, layout, name, seen)
    if problem:
      raise errors.UserError(f"{where} {problem}; {_use_official([layout])}")
    seen.add(name)
  required = (*layout.records, *layout.names) if layout else ()
  missing = [name for name in required if name not in seen]
  if missing or layout is None:
    raise errors.UserError(
      f"{path}: lacks {', '.join(missing) or 'any member'};"
      f" {_use_official(layouts)}"
    )
  return layout


def _member_problem(file, tar, member, layout, name, seen):
  """Return the problem of a member, or None."""
  if name in seen:
    return "is there twice"
  if not name and member.isdir():
    return None
  if name not in (*layout.records, *layout.names, *layout.optional):
    return f"is not in {layout.archive}"
  regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
  if not regular or member.issparse():
    return "is a link or not a plain file"
  file.allow(member.size)
  if name in layout.records:
    problem = _records_problem(tar, member, layout, layout.records[name])
  else:
    problem = _text_problem(tar, member, layout.names.get(name))
  file.allow(0)
  return problem


def _records_problem(tar, member, layout, count):
  size = count * layout.record_bytes
  if member.size != size:
    return f"has {member.size} bytes, not {size}"
  records = np.frombuffer(tar.extractfile(member).read(), np.uint8)
  records = records.reshape(-1, layout.record_bytes)
  for i, num_classes in enumerate(layout.num_classes):
    largest = records[:, i].max()
    if largest >= num_classes:
      return f"has the label {largest}, not below {num_classes}"
  return None


def _text_problem(tar, member, num_names):
  if not 0 <= member.size <= _MAX_TEXT:
    return f"has {member.size} bytes, too many"
  if num_names is not None:
    text = tar.extractfile(member).read().decode("ascii", "replace")
    found = len(set(text.split("\n")) - {""})
    if found != num_names:
      return f"has {found} class names, not {num_names}"
  return None
