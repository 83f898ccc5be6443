import os

import numpy as np
import pytest

from rescalevit_jax.data import array_cache

ARRAYS = {
  "images": np.arange(600, dtype=np.uint8).reshape(10, 4, 5, 3),
  "labels": np.arange(10, dtype=np.int32),
}


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "source"
  path.mkdir()
  (path / "a").write_text("a")
  (path / "b").write_text("b")
  return path


def test_saved_arrays_are_loaded(tmp_path):
  path = tmp_path / "new" / "x.npz"
  array_cache.save(path, ARRAYS)
  loaded = array_cache.load(path)
  assert loaded.keys() == ARRAYS.keys()
  for key, array in ARRAYS.items():
    assert loaded[key].dtype == array.dtype
    np.testing.assert_array_equal(loaded[key], array)
  assert os.listdir(path.parent) == ["x.npz"]


def test_loading_a_missing_file_returns_none(tmp_path):
  assert array_cache.load(tmp_path / "x.npz") is None


def test_a_damaged_file_never_loads_wrong_arrays(tmp_path):
  path = tmp_path / "x.npz"
  array_cache.save(path, ARRAYS)
  good = path.read_bytes()
  rng = np.random.default_rng(0)
  found = set()
  for i in range(400):
    damaged = bytearray(good)
    if i % 2:
      damaged = damaged[: rng.integers(len(good))]
    else:
      damaged[rng.integers(len(good))] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    loaded = array_cache.load(path)
    found.add(loaded is None)
    for key, array in (loaded or {}).items():
      np.testing.assert_array_equal(array, ARRAYS[key])
  assert found == {True, False}  # Some bytes, such as dates, have no effect.


@pytest.mark.parametrize("content", ["npy", "pickle", "text", "empty"])
def test_other_files_are_ignored(tmp_path, content):
  path = tmp_path / "x.npz"
  with open(path, "wb") as f:
    if content == "npy":
      np.save(f, np.arange(3))
    elif content == "pickle":
      np.savez(f, images=np.array([{}], dtype=object))
    elif content == "text":
      f.write(b"hello")
  assert array_cache.load(path) is None


def test_an_unwritable_folder_is_not_an_error(tmp_path):
  (tmp_path / "file").touch()
  array_cache.save(tmp_path / "file" / "x.npz", ARRAYS)
  assert array_cache.load(tmp_path / "file" / "x.npz") is None


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.npz"
  array_cache.save(path, ARRAYS)
  before = path.read_bytes()

  def savez(file, **arrays):
    del arrays
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", savez)
  array_cache.save(path, {"images": ARRAYS["images"] + 1})
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ["x.npz"]


def test_folder_is_in_the_user_cache(source, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  folder = array_cache.folder("digits-1.0.0", source)
  assert folder.parent == tmp_path / "xdg" / "rescalevit_jax"
  assert folder.name.startswith("digits-1.0.0-")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  folder = array_cache.folder("digits-1.0.0", source)
  assert folder.parent == tmp_path / "home" / ".cache" / "rescalevit_jax"


def test_folder_depends_on_every_property_of_the_files(source, tmp_path):
  def name():
    return array_cache.folder("x", source).name

  names = [name()]
  assert name() == names[0]
  os.utime(source / "a", ns=(0, 12345))
  names.append(name())
  (source / "b").write_text("bb")
  os.utime(source / "b", ns=(0, 0))
  names.append(name())
  (source / "b").write_text("b")
  os.utime(source / "b", ns=(0, 0))
  names.append(name())
  (source / "b").rename(source / "c")
  names.append(name())
  source = source.rename(tmp_path / "elsewhere")
  names.append(name())
  assert len(set(names)) == len(names)
