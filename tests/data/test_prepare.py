import dataclasses
import gzip
import io
import os
import pathlib
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import prepare as script
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.runtime import tensorflow_cpu

CIFAR10, CIFAR100 = script.LAYOUTS
# The official layouts, with few images.
SMALL10 = dataclasses.replace(
  CIFAR10, records={name: 4 for name in CIFAR10.records}
)
SMALL100 = dataclasses.replace(
  CIFAR100, records={"train.bin": 20, "test.bin": 6}
)
SMALL = (SMALL10, SMALL100)


def labels_of(layout, name):
  """uint8 [images, label bytes]."""
  rng = np.random.default_rng(len(name))
  count = layout.records[name]
  return np.stack(
    [rng.integers(0, n, count, np.uint8) for n in layout.num_classes], axis=1
  )


def images_of(layout, name):
  """uint8 [images, 32, 32, 3]."""
  rng = np.random.default_rng(sum(name.encode()))
  return rng.integers(0, 256, (layout.records[name], 32, 32, 3), np.uint8)


def members(layout):
  """{name: content} of an archive that is right."""
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
  """A tar file of plain files, then `extra` TarInfos."""
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


def refuses(path, *words):
  with pytest.raises(errors.UserError) as raised:
    script.inspect(str(path), SMALL)
  message = str(raised.value)
  assert "\n" not in message
  for word in (str(path), *words):
    assert word in message


class TestInspect:
  @pytest.mark.parametrize("layout", SMALL)
  def test_accepts_the_official_layout_under_any_name(self, tmp_path, layout):
    path = write(tmp_path / "any.name", members(layout))
    assert script.inspect(path, SMALL) == layout

  def test_accepts_the_folder_and_the_readme(self, tmp_path):
    contents = {
      **members(SMALL10),
      "cifar-10-batches-bin/readme.html": b"<meta>",
    }
    extra = [info("cifar-10-batches-bin/", tarfile.DIRTYPE)]
    path = write(tmp_path / "a", contents, extra)
    assert script.inspect(path, SMALL) == SMALL10

  def test_the_layouts_are_those_of_the_published_files(self):
    def sizes(layout):
      return {k: n * layout.record_bytes for k, n in layout.records.items()}

    assert sizes(CIFAR10) == {
      **{f"data_batch_{i}.bin": 30_730_000 for i in (1, 2, 3, 4, 5)},
      "test_batch.bin": 30_730_000,
    }
    assert sizes(CIFAR100) == {"train.bin": 153_700_000, "test.bin": 30_740_000}
    for layout in script.LAYOUTS:
      builder = tfds.builder(layout.dataset)
      assert layout.archive in tfds_builders.archive_names(builder)

  def test_accepts_a_whole_archive(self, tmp_path):
    # Of zeros, which compress fast.
    contents = members(SMALL10) | {
      f"{CIFAR10.folder}/{name}": bytes(count * CIFAR10.record_bytes)
      for name, count in CIFAR10.records.items()
    }
    path = write(tmp_path / "a", contents)
    assert script.inspect(path, script.LAYOUTS) == CIFAR10
    refuses(path, "30730000 bytes")
    # Damaged in the middle of a member, by a block of a kind that is none.
    packer = zlib.compressobj(1, wbits=31)
    half = packer.compress(tar_bytes(contents)[:40_000_000])
    half += packer.flush(zlib.Z_FULL_FLUSH) + b"\xff"
    (tmp_path / "a").write_bytes(half)
    with pytest.raises(errors.UserError, match="decompressing"):
      script.inspect(path, script.LAYOUTS)

  @pytest.mark.parametrize("name", list(members(SMALL10)))
  def test_missing_member(self, tmp_path, name):
    contents = members(SMALL10)
    del contents[name]
    refuses(write(tmp_path / "a", contents), "lacks", name.split("/")[1])

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
  def test_unexpected_member(self, tmp_path, name):
    contents = {**members(SMALL10), name: b"x"}
    refuses(write(tmp_path / "a", contents), repr(name), "is not in")
    contents = {name: b"x", **members(SMALL10)}
    refuses(write(tmp_path / "b", contents))

  def test_python_version_of_the_archive(self, tmp_path):
    path = write(tmp_path / "a", {"cifar-10-batches-py/data_batch_1": b"x"})
    refuses(path, "cifar-10-binary.tar.gz")

  @pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
  )
  def test_links_and_devices(self, tmp_path, kind):
    contents = members(SMALL10)
    name = "cifar-10-batches-bin/test_batch.bin"
    del contents[name]
    extra = [info(name, kind, "cifar-10-batches-bin/data_batch_1.bin")]
    refuses(write(tmp_path / "a", contents, extra), name, "not a plain file")

  def test_the_folder_as_a_link(self, tmp_path):
    extra = [info("cifar-10-batches-bin", tarfile.SYMTYPE, "/etc")]
    refuses(write(tmp_path / "a", {}, extra), "cifar-10-batches-bin")

  def test_a_member_twice(self, tmp_path):
    tar = tar_bytes(members(SMALL10))[:-1024].rstrip(b"\0")
    tar += bytes(-len(tar) % 512)
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(tar + tar_bytes(members(SMALL10))))
    refuses(path, "twice")

  @pytest.mark.parametrize("change", [-1, 1, -3073, 3073])
  def test_another_size(self, tmp_path, change):
    contents = members(SMALL10)
    name = "cifar-10-batches-bin/data_batch_3.bin"
    content = contents[name] + bytes(3073)
    contents[name] = content[: 4 * 3073 + change]
    refuses(write(tmp_path / "a", contents), name, f"not {4 * 3073}")

  @pytest.mark.parametrize(
    "layout,name,byte,value",
    [
      (SMALL10, "test_batch.bin", 3073, 10),
      (SMALL100, "train.bin", 3074 * 19, 20),
      (SMALL100, "test.bin", 3074 * 5 + 1, 100),
    ],
  )
  def test_label_out_of_range(self, tmp_path, layout, name, byte, value):
    contents = members(layout)
    content = bytearray(contents[f"{layout.folder}/{name}"])
    content[byte] = value - 1
    contents[f"{layout.folder}/{name}"] = bytes(content)
    assert script.inspect(write(tmp_path / "a", contents), SMALL) == layout
    content[byte] = value
    contents[f"{layout.folder}/{name}"] = bytes(content)
    refuses(write(tmp_path / "b", contents), name, f"label {value}")

  @pytest.mark.parametrize("text", [b"", b"a\nb\n", b"x\n" * 10])
  def test_wrong_class_names(self, tmp_path, text):
    name = "cifar-10-batches-bin/batches.meta.txt"
    contents = {**members(SMALL10), name: text}
    refuses(write(tmp_path / "a", contents), name, "class names, not 10")

  def test_a_huge_text(self, tmp_path):
    name = "cifar-10-batches-bin/readme.html"
    contents = {**members(SMALL10), name: bytes(100_000)}
    refuses(write(tmp_path / "a", contents), name, "too many")

  @pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999, -1])
  def test_cut_off(self, tmp_path, keep):
    path = tmp_path / "a"
    write(path, members(SMALL10))
    size = path.stat().st_size
    os.truncate(path, keep % size if abs(keep) >= 1 else int(keep * size))
    refuses(path, "gzip")

  @pytest.mark.parametrize(
    "where,word",
    [(-6, "CRC"), (10, "invalid")],  # gzip's own checksum; the first block.
  )
  def test_changed_inside(self, tmp_path, where, word):
    path = tmp_path / "a"
    write(path, members(SMALL10))
    content = bytearray(path.read_bytes())
    content[where] ^= 0b110
    path.write_bytes(content)
    refuses(path, word)

  def test_something_after_the_end(self, tmp_path):
    path = tmp_path / "a"
    tar = tar_bytes(members(SMALL10)) + bytes(20_000)  # As tar pads.
    path.write_bytes(gzip.compress(tar))
    assert script.inspect(str(path), SMALL) == SMALL10
    for more in (b"x", bytes(100_000)):
      path.write_bytes(gzip.compress(tar + more))
      refuses(path, "follows")

  def test_endless_zeros(self, tmp_path):
    path = tmp_path / "a"
    packer = zlib.compressobj(9, wbits=31)
    content = packer.compress(tar_bytes({}))
    for _ in range(200):
      content += packer.compress(bytes(1 << 20))
    path.write_bytes(content + packer.flush())
    refuses(path)

  @pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
  def test_a_header_of_any_size(self, tmp_path, kind):
    # A record of five bytes becomes an object of many.
    content = b"5 a=\n" * 10_000_000
    extra = info("x", kind)
    extra.size = len(content)
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(extra.tobuf() + content, 1))
    path.write_bytes(path.read_bytes()[:70_000])  # Within the size allowed.
    tracemalloc.start()
    try:
      refuses(path, "belongs")
      assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
      tracemalloc.stop()

  def test_a_sparse_file(self, tmp_path):
    # Of which tarfile makes up all but two bytes.
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

  def test_one_folder_again_and_again(self, tmp_path):
    folder = info("cifar-10-batches-bin", tarfile.DIRTYPE)
    refuses(write(tmp_path / "a", {}, [folder] * 3), "twice")

  def test_a_file_larger_than_any(self, tmp_path):
    # As of a name in gzip's header, of any length.
    path = tmp_path / "a"
    path.write_bytes(b"\x1f\x8b\x08\x08\0\0\0\0\0\3")
    os.truncate(path, 1 << 30)
    refuses(path, "larger than any of them")

  def test_a_long_name_is_cut_short(self, tmp_path):
    path = write(tmp_path / "a", {"x" * 60_000: b""})
    with pytest.raises(errors.UserError) as raised:
      script.inspect(path, SMALL)
    assert len(str(raised.value)) < 1000

  def test_other_kinds_of_files(self, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(tar_bytes(members(SMALL10)))
    refuses(path, "gzip")
    path.write_bytes(gzip.compress(b"hello" * 1000))
    refuses(path, "tar")
    path.write_bytes(gzip.compress(tar_bytes({})))
    refuses(path, "lacks any member")
    refuses(tmp_path, "Is a directory")
    refuses(tmp_path / "none", "No such file")


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Lets the script accept the small archives; returns one of CIFAR-10."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(script, "LAYOUTS", SMALL)
  return write(tmp_path / "small", members(SMALL10))


def check_data(layout, data_dir):
  dataset = dataset_lib.load(layout.dataset, str(data_dir))
  for split, is_test in ((dataset.train, False), (dataset.test, True)):
    names = [n for n in layout.records if ("test" in n) == is_test]
    expected = [
      (image.tobytes(), label)
      for name in names
      for image, label in zip(
        images_of(layout, name),
        labels_of(layout, name)[:, -1].tolist(),
        strict=True,
      )
    ]
    found = zip(
      [image.tobytes() for image in split.images],
      split.labels.tolist(),
      strict=True,
    )
    assert sorted(found) == sorted(expected)


class TestMain:
  def test_prepares_both_then_says_so(self, small, tmp_path, capsys):
    try:
      tensorflow_cpu.load()
    except errors.UserError as e:
      pytest.skip(str(e))
    other = write(tmp_path / "other", members(SMALL100))
    out = tmp_path / "new" / "out"
    args = [
      f"--archive={small}",
      f"--archive={other}",
      f"--data_dir={out}",
    ]
    assert script.main(args) == 0
    notes = [
      line for line in capsys.readouterr().out.splitlines() if "note" in line
    ]
    assert [small in notes[0], other in notes[1], len(notes)] == [True, True, 2]
    check_data(SMALL10, out)
    check_data(SMALL100, out)
    assert sorted(os.listdir(out)) == ["cifar10", "cifar100"]

    assert script.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["prepared already" in line for line in lines] == [True, True]
    # The process goes on to expect the published files.
    url_infos = tfds.builder("cifar10").url_infos
    assert [x.size for x in url_infos.values()] == [170_052_171]

  def test_published_file_needs_no_note(
    self, small, tmp_path, capsys, monkeypatch
  ):
    builder = tfds.builder("cifar10")
    (url,) = builder.url_infos
    found = tfds.download.checksums.compute_url_info(small)
    found.filename = CIFAR10.archive
    monkeypatch.setitem(builder.url_infos, url, found)
    monkeypatch.setattr(tfds_builders, "prepare", lambda *args, **kwargs: None)
    assert script.main([f"--archive={small}", f"--data_dir={tmp_path}"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_one_bad_archive_stops_all(self, small, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(b"hello")
    out = tmp_path / "out"
    args = [f"--archive={small}", f"--archive={bad}", f"--data_dir={out}"]
    assert script.main(args) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith(f"error: {bad}: ")
    assert stderr.count("\n") == 1
    assert not out.exists()

  @pytest.mark.parametrize(
    "failure,code",
    [
      (KeyboardInterrupt(), 130),
      (errors.UserError("no space"), 1),
      (OSError(28, "No space left on device"), 1),
    ],
  )
  def test_failure_leaves_nothing(
    self, small, tmp_path, capsys, monkeypatch, failure, code
  ):
    out = tmp_path / "out"
    seen = []

    def prepare(builder, download_dir, manual_dir):
      seen.append(os.path.dirname(manual_dir))
      os.makedirs(download_dir)
      pathlib.Path(download_dir, "half").write_text("x")
      raise failure

    monkeypatch.setattr(tfds_builders, "prepare", prepare)
    assert script.main([f"--archive={small}", f"--data_dir={out}"]) == code
    assert seen == [str(out)]  # In the file system that has the space.
    assert os.listdir(out) == []
    assert capsys.readouterr().err.count("\n") == 1

  def test_place_that_cannot_be_written(self, small, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert script.main([f"--archive={small}", f"--data_dir={out}"]) == 1
    assert str(out) in capsys.readouterr().err

  def test_by_name(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = ["--dataset=digits", f"--data_dir={tmp_path}"]
    assert script.main(args) == 0
    assert len(dataset_lib.load("digits", str(tmp_path)).test.labels) == 360
    capsys.readouterr()
    assert script.main(args) == 0
    assert "digits is prepared already" in capsys.readouterr().out

  @pytest.mark.parametrize(
    "name", ["digit", "", "imdb_reviews", "cats_vs_dogs"]
  )
  def test_a_name_that_does_not_do(self, tmp_path, capsys, name):
    assert script.main([f"--dataset={name}", f"--data_dir={tmp_path}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert os.listdir(tmp_path) == []

  @pytest.mark.parametrize("args", [[], ["--dataset=digits", "--archive=x"]])
  def test_exactly_one_source(self, args, capsys):
    with pytest.raises(SystemExit) as raised:
      script.main(args)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err
