"""Validation of untrusted archives."""

import gzip
import os
import tarfile
import tracemalloc
import zlib

import cifar
import pytest
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.data import untrusted_archive


def refuses(path, *words):
  with pytest.raises(errors.UserError) as raised:
    untrusted_archive.check(str(path), cifar.SMALL)
  message = str(raised.value)
  assert "\n" not in message
  for word in (str(path), *words):
    assert word in message


@pytest.mark.parametrize("layout", cifar.SMALL)
def test_accepts_the_official_layout_under_any_name(tmp_path, layout):
  path = cifar.write(tmp_path / "any.name", cifar.members(layout))
  assert untrusted_archive.check(path, cifar.SMALL) == layout


def test_accepts_the_folder_and_the_readme(tmp_path):
  contents = {
    **cifar.members(cifar.SMALL10),
    "cifar-10-batches-bin/readme.html": b"<meta>",
  }
  extra = [cifar.info("cifar-10-batches-bin/", tarfile.DIRTYPE)]
  path = cifar.write(tmp_path / "a", contents, extra)
  assert untrusted_archive.check(path, cifar.SMALL) == cifar.SMALL10


def test_layouts_match_the_published_files():
  def sizes(layout):
    return {k: n * layout.record_bytes for k, n in layout.records.items()}

  assert sizes(cifar.CIFAR10) == {
    **{f"data_batch_{i}.bin": 30_730_000 for i in (1, 2, 3, 4, 5)},
    "test_batch.bin": 30_730_000,
  }
  assert sizes(cifar.CIFAR100) == {
    "train.bin": 153_700_000,
    "test.bin": 30_740_000,
  }
  for layout in untrusted_archive.LAYOUTS:
    builder = tfds.builder(layout.dataset)
    assert layout.archive in tfds_builders.archive_names(builder)


def test_accepts_a_whole_archive(tmp_path):
  # Zeros compress fast.
  contents = cifar.members(cifar.SMALL10) | {
    f"{cifar.CIFAR10.folder}/{name}": bytes(count * cifar.CIFAR10.record_bytes)
    for name, count in cifar.CIFAR10.records.items()
  }
  path = cifar.write(tmp_path / "a", contents)
  assert (
    untrusted_archive.check(path, untrusted_archive.LAYOUTS) == cifar.CIFAR10
  )
  refuses(path, "30730000 bytes")
  # Damage a member with an invalid block.
  packer = zlib.compressobj(1, wbits=31)
  half = packer.compress(cifar.tar_bytes(contents)[:40_000_000])
  half += packer.flush(zlib.Z_FULL_FLUSH) + b"\xff"
  (tmp_path / "a").write_bytes(half)
  with pytest.raises(errors.UserError, match="decompressing"):
    untrusted_archive.check(path, untrusted_archive.LAYOUTS)


@pytest.mark.parametrize("name", list(cifar.members(cifar.SMALL10)))
def test_missing_member_is_refused(tmp_path, name):
  contents = cifar.members(cifar.SMALL10)
  del contents[name]
  refuses(cifar.write(tmp_path / "a", contents), "lacks", name.split("/")[1])


@pytest.mark.parametrize(
  "name",
  [
    "cifar-10-batches-bin/data_batch_6.bin",
    "cifar-10-batches-bin/sub/test_batch.bin",
    "cifar-10-batches-bin/../x",
    "../x",
    "/etc/x",
    "/cifar-10-batches-bin/test_batch.bin",
    "x",
    "other/test_batch.bin",
    "cifar-100-binary/test.bin",
  ],
)
def test_unexpected_member_is_refused(tmp_path, name):
  contents = {**cifar.members(cifar.SMALL10), name: b"x"}
  refuses(cifar.write(tmp_path / "a", contents), repr(name), "is not in")
  contents = {name: b"x", **cifar.members(cifar.SMALL10)}
  refuses(cifar.write(tmp_path / "b", contents))


def test_python_version_of_the_archive_is_refused(tmp_path):
  path = cifar.write(tmp_path / "a", {"cifar-10-batches-py/data_batch_1": b"x"})
  refuses(path, "cifar-10-binary.tar.gz")


@pytest.mark.parametrize(
  "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
  contents = cifar.members(cifar.SMALL10)
  name = "cifar-10-batches-bin/test_batch.bin"
  del contents[name]
  extra = [cifar.info(name, kind, "cifar-10-batches-bin/data_batch_1.bin")]
  refuses(
    cifar.write(tmp_path / "a", contents, extra),
    name,
    "not a plain file",
  )


def test_link_in_place_of_the_folder_is_refused(tmp_path):
  extra = [cifar.info("cifar-10-batches-bin", tarfile.SYMTYPE, "/etc")]
  refuses(cifar.write(tmp_path / "a", {}, extra), "cifar-10-batches-bin")


def test_duplicate_member_is_refused(tmp_path):
  tar = cifar.tar_bytes(cifar.members(cifar.SMALL10))[:-1024].rstrip(b"\0")
  tar += bytes(-len(tar) % 512)
  path = tmp_path / "a"
  path.write_bytes(
    gzip.compress(tar + cifar.tar_bytes(cifar.members(cifar.SMALL10)))
  )
  refuses(path, "twice")


@pytest.mark.parametrize("change", [-1, 1, -3073, 3073])
def test_wrong_member_size_is_refused(tmp_path, change):
  contents = cifar.members(cifar.SMALL10)
  name = "cifar-10-batches-bin/data_batch_3.bin"
  content = contents[name] + bytes(3073)
  contents[name] = content[: 4 * 3073 + change]
  refuses(cifar.write(tmp_path / "a", contents), name, f"not {4 * 3073}")


@pytest.mark.parametrize(
  "layout,name,byte,value",
  [
    (cifar.SMALL10, "test_batch.bin", 3073, 10),
    (cifar.SMALL100, "train.bin", 3074 * 19, 20),
    (cifar.SMALL100, "test.bin", 3074 * 5 + 1, 100),
  ],
)
def test_label_out_of_range_is_refused(tmp_path, layout, name, byte, value):
  contents = cifar.members(layout)
  content = bytearray(contents[f"{layout.folder}/{name}"])
  content[byte] = value - 1
  contents[f"{layout.folder}/{name}"] = bytes(content)
  assert (
    untrusted_archive.check(cifar.write(tmp_path / "a", contents), cifar.SMALL)
    == layout
  )
  content[byte] = value
  contents[f"{layout.folder}/{name}"] = bytes(content)
  refuses(cifar.write(tmp_path / "b", contents), name, f"label {value}")


@pytest.mark.parametrize("text", [b"", b"a\nb\n", b"x\n" * 10])
def test_wrong_class_names_are_refused(tmp_path, text):
  name = "cifar-10-batches-bin/batches.meta.txt"
  contents = {**cifar.members(cifar.SMALL10), name: text}
  refuses(cifar.write(tmp_path / "a", contents), name, "class names, not 10")


def test_huge_text_member_is_refused(tmp_path):
  name = "cifar-10-batches-bin/readme.html"
  contents = {
    **cifar.members(cifar.SMALL10),
    name: bytes(100_000),
  }
  refuses(cifar.write(tmp_path / "a", contents), name, "too many")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999, -1])
def test_truncated_archive_is_refused(tmp_path, keep):
  path = tmp_path / "a"
  cifar.write(path, cifar.members(cifar.SMALL10))
  size = path.stat().st_size
  os.truncate(path, keep % size if abs(keep) >= 1 else int(keep * size))
  refuses(path, "gzip")


@pytest.mark.parametrize(
  "where,word",
  [(-6, "CRC"), (10, "invalid")],  # gzip's checksum and the first block.
)
def test_bit_flip_in_compressed_data_is_refused(tmp_path, where, word):
  path = tmp_path / "a"
  cifar.write(path, cifar.members(cifar.SMALL10))
  content = bytearray(path.read_bytes())
  content[where] ^= 0b110
  path.write_bytes(content)
  refuses(path, word)


def test_data_after_the_end_is_refused(tmp_path):
  path = tmp_path / "a"
  tar = cifar.tar_bytes(cifar.members(cifar.SMALL10)) + bytes(
    20_000
  )  # tar's padding.
  path.write_bytes(gzip.compress(tar))
  assert untrusted_archive.check(str(path), cifar.SMALL) == cifar.SMALL10
  for more in (b"x", bytes(100_000)):
    path.write_bytes(gzip.compress(tar + more))
    refuses(path, "data follow")


def test_endless_zeros_are_refused(tmp_path):
  path = tmp_path / "a"
  packer = zlib.compressobj(9, wbits=31)
  content = packer.compress(cifar.tar_bytes({}))
  for _ in range(200):
    content += packer.compress(bytes(1 << 20))
  path.write_bytes(content + packer.flush())
  refuses(path)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_huge_extended_header_is_refused(tmp_path, kind):
  # tarfile would parse each five-byte record into a large object.
  content = b"5 a=\n" * 10_000_000
  extra = cifar.info("x", kind)
  extra.size = len(content)
  path = tmp_path / "a"
  path.write_bytes(gzip.compress(extra.tobuf() + content, 1))
  path.write_bytes(path.read_bytes()[:70_000])  # Within the allowed size.
  tracemalloc.start()
  try:
    refuses(path, "larger than expected")
    assert tracemalloc.get_traced_memory()[1] < 20e6
  finally:
    tracemalloc.stop()


def test_sparse_member_is_refused(tmp_path):
  # tarfile would fill in all but two bytes.
  name = "cifar-10-batches-bin/test_batch.bin"
  size = 4 * 3073
  sparse = tarfile.TarInfo(name)
  sparse.size = size
  sparse.pax_headers = {
    "GNU.sparse.map": f"{size},1,1,1",
    "GNU.sparse.size": str(size),
  }
  path = tmp_path / "a"
  path.write_bytes(
    gzip.compress(sparse.tobuf(tarfile.PAX_FORMAT) + bytes(20_480))
  )
  refuses(path, name, "not a plain file")


def test_duplicate_folder_is_refused(tmp_path):
  folder = cifar.info("cifar-10-batches-bin", tarfile.DIRTYPE)
  refuses(cifar.write(tmp_path / "a", {}, [folder] * 3), "twice")


def test_archive_larger_than_any_dataset_is_refused(tmp_path):
  # The gzip header starts a file name of unlimited length.
  path = tmp_path / "a"
  path.write_bytes(b"\x1f\x8b\x08\x08\0\0\0\0\0\3")
  os.truncate(path, 1 << 30)
  refuses(path, "larger than any of them")


def test_a_long_name_is_truncated(tmp_path):
  path = cifar.write(tmp_path / "a", {"x" * 60_000: b""})
  with pytest.raises(errors.UserError) as raised:
    untrusted_archive.check(path, cifar.SMALL)
  assert len(str(raised.value)) < 1000


def test_other_file_types_are_refused(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(cifar.tar_bytes(cifar.members(cifar.SMALL10)))
  refuses(path, "gzip")
  path.write_bytes(gzip.compress(b"hello" * 1000))
  refuses(path, "tar")
  path.write_bytes(gzip.compress(cifar.tar_bytes({})))
  refuses(path, "lacks any member")
  refuses(tmp_path, "Is a directory")
  refuses(tmp_path / "none", "No such file")
