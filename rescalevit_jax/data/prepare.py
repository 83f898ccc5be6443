"""Prepare a dataset: download it, or convert an official archive.

python -m rescalevit_jax.data.prepare --dataset=cifar10
python -m rescalevit_jax.data.prepare --archive=cifar-10-binary.tar.gz

An interrupted command leaves no half-prepared dataset.
"""

from collections.abc import Sequence
import os
import pathlib
import signal
import sys
import tempfile

import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import records
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.data import untrusted_archive
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import compat


def main(argv: Sequence[str] | None = None) -> int:
  """Prepare datasets; return the exit code."""
  parser = cli.parser(__doc__)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--dataset", help="cifar10, cifar100, digits, ...")
  source.add_argument(
    "--archive",
    action="append",
    metavar="FILE",
    help="official binary archive of CIFAR-10 or CIFAR-100, under any name;"
    " can be repeated",
  )
  parser.add_argument(
    "--data_dir",
    help="folder of prepared datasets; default: ~/tensorflow_datasets",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: _run(args))


def _run(args):
  if args.dataset is not None:
    builder = tfds_builders.open_builder(args.dataset, args.data_dir)
    if not _report_prepared(builder):
      records.check_features(builder, any_size=True)
      tfds_builders.prepare(builder)
    return
  # Check all archives before the first is unpacked.
  accepted = untrusted_archive.LAYOUTS
  layouts = [untrusted_archive.check(path, accepted) for path in args.archive]
  for path, layout in zip(args.archive, layouts, strict=True):
    _prepare_from_archive(path, layout, args.data_dir)


def _prepare_from_archive(path, layout, data_dir):
  """Run tfds' builder with an archive instead of its download."""
  builder = tfds_builders.open_builder(layout.dataset, data_dir)
  if _report_prepared(builder):
    return
  root = builder.data_dir_root
  try:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=root, prefix="prepare_data.", ignore_cleanup_errors=True
    ) as scratch:
      link = pathlib.Path(scratch, layout.archive)
      link.symlink_to(pathlib.Path(path).resolve())
      with _expect(builder, link):
        tfds_builders.prepare(
          builder,
          download_dir=os.path.join(scratch, "downloads"),
          manual_dir=scratch,
        )
  except OSError as e:
    raise errors.UserError(
      f"{root}: cannot be written ({e.strerror}); choose another --data_dir"
    ) from e


def _expect(builder, path):
  """Make a builder expect this archive, whose content has been checked."""
  url = tfds_builders.archive_names(builder)[path.name]
  info = tfds.download.checksums.compute_url_info(path)
  if info != builder.url_infos[url]:
    print(
      f"note: {path.resolve()} is not the published file (sha256"
      f" {info.checksum}), but its content has the same layout"
    )
  return compat.tfds_expected_file(builder, url, info)


def _report_prepared(builder):
  """Return whether the dataset is already prepared; if so, log it."""
  prepared = tfds_builders.is_prepared(builder)
  if prepared:
    print(f"{builder.name} is prepared already: {builder.data_dir}")
  return prepared


if __name__ == "__main__":
  # As Ctrl-C: remove temporary files.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(main())
