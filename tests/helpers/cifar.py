"""Small archives with the layout of CIFAR's official archives."""

import dataclasses
import gzip
import io
import tarfile

import numpy as np

from rescalevit_jax.data import untrusted_archive

CIFAR10, CIFAR100 = untrusted_archive.LAYOUTS
# The official layouts, with few images.
SMALL10 = dataclasses.replace(
  CIFAR10, records={name: 4 for name in CIFAR10.records}
)
SMALL100 = dataclasses.replace(
  CIFAR100, records={"train.bin": 20, "test.bin": 6}
)
SMALL = (SMALL10, SMALL100)


def labels_of(layout, name):
  """Return random labels, uint8 [images, label bytes]."""
  rng = np.random.default_rng(len(name))
  count = layout.records[name]
  return np.stack(
    [rng.integers(0, n, count, np.uint8) for n in layout.num_classes], axis=1
  )


def images_of(layout, name):
  """Return random images, uint8 [images, 32, 32, 3]."""
  rng = np.random.default_rng(sum(name.encode()))
  return rng.integers(0, 256, (layout.records[name], 32, 32, 3), np.uint8)


def members(layout):
  """Return the members of a valid archive: content by name."""
  found = {
    f"{layout.folder}/{name}": b"".join(b"class%d\n" % i for i in range(n))
    for name, n in layout.names.items()
  }
  for name in layout.records:
    planes = images_of(layout, name).transpose(0, 3, 1, 2)
    records = [labels_of(layout, name), planes.reshape(len(planes), -1)]
    found[f"{layout.folder}/{name}"] = np.concatenate(records, 1).tobytes()
  return found


def tar_bytes(contents, extra=()):
  """Return a tar file of plain files and extra members without content."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, content in contents.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
    for info in extra:
      tar.addfile(info)
  return file.getvalue()


def write(path, contents, extra=()):
  path.write_bytes(gzip.compress(tar_bytes(contents, extra), 1))
  return str(path)


def info(name, kind, linkname=""):
  found = tarfile.TarInfo(name)
  found.type, found.linkname = kind, linkname
  return found
