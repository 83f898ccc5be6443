"""Prepares a data set: downloads it, or takes archives that you bring.

python -m rescalevit_jax.data.prepare --dataset=cifar10
python -m rescalevit_jax.data.prepare --archive=cifar-10-binary.tar.gz
"""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import gzip
import os
import pathlib
import signal
import sys
import tarfile
import tempfile

import numpy as np
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import records
from rescalevit_jax.data import tfds_builders

_PIXELS = 3 * 32 * 32  # Bytes of a record after its labels.
_MAX_TEXT = 1 << 16  # Bytes; the official texts have less than 2 KB.
_MAX_HEADERS = 1 << 18  # Bytes between the contents of two members.


@dataclasses.dataclass(frozen=True)
class Layout:
  """What an official binary archive has inside.

  Attributes:
    dataset: tfds' name of the data set.
    archive: the archive's official file name.
    folder: that all members are in.
    records: images of each file of records, by its name in `folder`.
    num_classes: number of classes of each label byte of a record, in order.
    names: number of class names of each text file, one on a line.
    others: further files that may be there.
  """

  dataset: str
  archive: str
  folder: str
  records: Mapping[str, int]
  num_classes: tuple[int, ...]
  names: Mapping[str, int]
  others: tuple[str, ...] = ()

  @property
  def record_bytes(self) -> int:
    return len(self.num_classes) + _PIXELS

  @property
  def max_bytes(self) -> int:
    """What the archive cannot be larger than, packed or not."""
    files = len(self.records) + len(self.names) + len(self.others)
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
    others=("readme.html",),
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


def main(argv: Sequence[str] | None = None) -> int:
  """Prepares data sets; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--dataset", help="cifar10, cifar100, digits, ...")
  what.add_argument(
    "--archive",
    action="append",
    metavar="FILE",
    help="official binary archive of CIFAR-10 or CIFAR-100, under any name;"
    " can be repeated",
  )
  parser.add_argument(
    "--data_dir",
    help="where prepared data sets lie; default: tfds' own,"
    " ~/tensorflow_datasets",
  )
  args = parser.parse_args(argv)
  try:
    if args.dataset is not None:
      _prepare_by_name(args.dataset, args.data_dir)
    else:
      # All are looked at before the first is unpacked.
      layouts = [inspect(path, LAYOUTS) for path in args.archive]
      for path, layout in zip(args.archive, layouts, strict=True):
        _prepare_from_archive(path, layout, args.data_dir)
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted: no data set is half prepared", file=sys.stderr)
    return 130
  return 0


class _Ration:
  """A file of which only so much is read as what is looked for can have.

  A few bytes of gzip may stand for gigabytes, and tarfile reads some headers
  whole.
  """

  def __init__(self, file: gzip.GzipFile):
    self._file = file
    self.grant(0)

  def grant(self, size: int) -> None:
    """Grants a member's content of this size, or none, and headers."""
    self._left = size + _MAX_HEADERS

  def read(self, size: int) -> bytes:
    content = self._file.read(size)
    self._left -= len(content)
    if self._left < 0:
      raise ValueError("more in one place than belongs there")
    return content


def inspect(path: str, layouts: Sequence[Layout]) -> Layout:
  """Checks that an archive is exactly one of the official ones, inside.

  An archive may come from anywhere: nothing is written, and memory is needed
  for no more than twice the largest file of records and a few MB.

  Args:
    path: of the archive.
    layouts: that are accepted.

  Returns:
    The layout that it has.

  Raises:
    UserError: it is no gzip-compressed tar file, or it is damaged, or a member
      is missing, unexpected, of another kind or size, or has a label that is
      out of range.
  """
  try:
    if os.path.getsize(path) > max(layout.max_bytes for layout in layouts):
      raise ValueError("it is larger than any of them")
    with gzip.open(path) as unzipped:
      ration = _Ration(unzipped)
      with tarfile.open(fileobj=ration, mode="r|") as tar:
        layout = _check_members(path, ration, tar, layouts)
      # gzip compares its checksum at the end of the file only.
      if any(unzipped.read(_MAX_TEXT)) or unzipped.read(1):
        raise errors.UserError(f"{path}: something follows the tar file")
      return layout
  except errors.UserError:
    raise
  except Exception as e:  # A damaged archive can fail in a dozen ways.
    reason = getattr(e, "strerror", None) or " ".join(str(e).split())
    raise errors.UserError(
      f"{path}: no intact gzip-compressed tar file ({reason}); bring"
      f" {' or '.join(layout.archive for layout in layouts)} as published"
    ) from e


def _check_members(
  path: str, ration: _Ration, tar: tarfile.TarFile, layouts: Sequence[Layout]
) -> Layout:
  layout, seen = None, set()
  while member := tar.next():
    folder, _, name = member.name.partition("/")
    layout = layout or next((x for x in layouts if x.folder == folder), None)
    if layout is None or folder != layout.folder:
      raise errors.UserError(
        f"{path}: has {member.name[:99]!r}, which is not in"
        f" {' or '.join(x.archive for x in layouts)}"
      )
    what = f"{path}: {member.name[:99]!r}"
    if name in seen:
      raise errors.UserError(f"{what} is there twice")
    seen.add(name)
    if not name and member.isdir():
      continue
    if name not in (*layout.records, *layout.names, *layout.others):
      raise errors.UserError(f"{what} is not in {layout.archive}")
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
    if not plain or member.issparse():
      raise errors.UserError(f"{what} is a link or not a plain file")
    ration.grant(member.size)
    _check_content(what, tar, member, layout, name)
    ration.grant(0)
  required = (*layout.records, *layout.names) if layout else ()
  missing = [name for name in required if name not in seen]
  if missing or layout is None:
    raise errors.UserError(
      f"{path}: lacks {', '.join(missing) or 'any member'}"
    )
  return layout


def _check_content(what, tar, member, layout, name):
  if name in layout.records:
    size = layout.records[name] * layout.record_bytes
    if member.size != size:
      raise errors.UserError(f"{what} has {member.size} bytes, not {size}")
    records = np.frombuffer(tar.extractfile(member).read(), np.uint8)
    records = records.reshape(-1, layout.record_bytes)
    for i, num_classes in enumerate(layout.num_classes):
      largest = records[:, i].max()
      if largest >= num_classes:
        raise errors.UserError(
          f"{what} has the label {largest}, not below {num_classes}"
        )
    return
  if not 0 <= member.size <= _MAX_TEXT:
    raise errors.UserError(f"{what} has {member.size} bytes, too many")
  if name in layout.names:
    text = tar.extractfile(member).read().decode("ascii", "replace")
    found = len(set(text.split("\n")) - {""})
    if found != layout.names[name]:
      raise errors.UserError(
        f"{what} has {found} class names, not {layout.names[name]}"
      )


def _prepare_by_name(name: str, data_dir: str | None) -> None:
  builder = tfds_builders.open_builder(name, data_dir)
  if not _is_ready(builder):
    records.check_features(builder, any_size=True)
    tfds_builders.prepare(builder)


def _prepare_from_archive(
  path: str, layout: Layout, data_dir: str | None
) -> None:
  """Lets tfds' builder take an archive instead of downloading it."""
  builder = tfds_builders.open_builder(layout.dataset, data_dir)
  if _is_ready(builder):
    return
  root = builder.data_dir_root
  try:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=root, prefix="prepare_data.", ignore_cleanup_errors=True
    ) as scratch:
      link = pathlib.Path(scratch, layout.archive)
      link.symlink_to(pathlib.Path(path).resolve())
      with _expected(builder, link):
        tfds_builders.prepare(
          builder,
          download_dir=os.path.join(scratch, "downloads"),
          manual_dir=scratch,
        )
  except OSError as e:
    raise errors.UserError(
      f"cannot write to {root}: {e.strerror}; choose another --data_dir"
    ) from e


@contextlib.contextmanager
def _expected(builder: tfds.core.DatasetBuilder, path: pathlib.Path):
  """Makes a builder expect this archive, in this process only."""
  infos = builder.url_infos
  url = tfds_builders.archive_names(builder)[path.name]
  official, found = infos[url], tfds.download.checksums.compute_url_info(path)
  if found != official:
    print(
      f"note: {path.resolve()} is not the published file (sha256"
      f" {found.checksum}), but what is in it has the same layout"
    )
  infos[url] = found
  try:
    yield
  finally:
    infos[url] = official


def _is_ready(builder):
  if tfds_builders.is_prepared(builder):
    print(f"{builder.name} is prepared already: {builder.data_dir}")
    return True
  return False


if __name__ == "__main__":
  # As Ctrl-C does: with temporary files removed.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(main())
