"""No command ever unpickles a file, because pickles can run code."""

import ast
import contextlib
import gzip
import io
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import paths
import pytest
import tfrecord_frames
import trees

from rescalevit_jax import errors
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import array_cache
from rescalevit_jax.data import dataset
from rescalevit_jax.data import image_files
from rescalevit_jax.data import prepare
from rescalevit_jax.data import tfrecord
from rescalevit_jax.data import untrusted_archive
from rescalevit_jax.pretrained import load
from rescalevit_jax.runs import checksums
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import subprocess_run

PROTOCOLS = (0, pickle.HIGHEST_PROTOCOL)  # Text and binary protocols.


class Bomb:
  """An object whose pickle creates a file when loaded."""

  def __init__(self, marker: pathlib.Path):
    self._marker = str(marker)

  def __reduce__(self):
    return open, (self._marker, "w")


@pytest.fixture
def bomb(tmp_path):
  marker = tmp_path / "it went off"
  yield Bomb(marker)
  assert not marker.exists()


@pytest.fixture(params=PROTOCOLS)
def pickled(request, bomb):
  return pickle.dumps(bomb, request.param)


@contextlib.contextmanager
def refused_or_ignored():
  try:
    yield
  except errors.UserError as e:
    assert len(str(e).splitlines()) == 1


def refused(function, *args):
  with pytest.raises(errors.UserError) as caught:
    function(*args)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bomb_creates_its_file_if_unpickled(protocol, tmp_path):
  pickle.loads(pickle.dumps(Bomb(tmp_path / "marker"), protocol)).close()
  assert (tmp_path / "marker").exists()


# Files of arrays.


@pytest.mark.parametrize("place", ["file", "member", "object", "npy", "fields"])
def test_pickles_in_weights_are_refused(place, bomb, pickled, tmp_path):
  path = tmp_path / "a.npz"
  arrays = trees.arrays()
  if place == "object":
    arrays["cls"] = np.array([bomb], object)
  elif place == "fields":
    arrays["cls"] = np.array([(1.0, bomb)], "f4,O")
  trees.write(tmp_path, arrays, path.name)
  if place == "file":
    path.write_bytes(pickled)
  elif place == "npy":
    with open(path, "wb") as f:
      np.save(f, np.array([bomb], object))
  elif place == "member":
    del arrays["cls"]
    trees.write(tmp_path, arrays, path.name)
    with zipfile.ZipFile(path, "a") as z:
      z.writestr("cls.npy", pickled)
  refused(load.load, path, *trees.fresh(seed=1))
  refused(npz_model.load, path)


@pytest.mark.parametrize("place", ["file", "object"])
def test_pickles_in_the_array_cache_are_ignored(place, bomb, pickled, tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, images=np.array([bomb], object), labels=np.zeros(1))
  if place == "file":
    path.write_bytes(pickled)
  assert array_cache.load(path) is None


# Folders of runs.


@pytest.mark.parametrize(
  "name", ["config.json", "metrics.jsonl", "result.json", "class_names.json"]
)
def test_pickles_in_a_run_are_not_loaded(name, pickled, tiny_run, tmp_path):
  run = shutil.copytree(tiny_run, tmp_path / "run")
  assert (run / name).exists()
  (run / name).write_bytes(pickled)
  assert run_reader.find(tmp_path)
  with refused_or_ignored():
    assert run_reader.read(run).metrics or name == "metrics.jsonl"
  with refused_or_ignored():
    trained_model.load(run)
  assert subprocess_run.step_since(run, 0) == 0 or name != "metrics.jsonl"
  if name == "metrics.jsonl":
    config = folder_lib.read_config(run)
    with metric_writers.MetricWriter(run, config, lambda line: True):
      pass
    assert (run / name).read_text() == ""
  if name == "config.json":
    refused(folder_lib.require_config, run)


@pytest.mark.parametrize("kind", ["best", "last"])
def test_pickles_in_checkpoints_are_not_loaded(
  kind, pickled, tiny_run, tmp_path
):
  step = folder_lib.saved_steps(tiny_run, kind)[-1]
  place = pathlib.Path("checkpoints", kind, str(step))
  names = [
    path.relative_to(tiny_run)
    for path in (tiny_run / place).rglob("*")
    if path.is_file()
  ]
  assert len(names) > 5
  run = shutil.copytree(tiny_run, tmp_path / "run")
  for name in names:
    content = (run / name).read_bytes()
    (run / name).write_bytes(pickled)
    if name.name != checksums.NAME:
      checksums.write(run / place)  # Make the checksum match.
    with refused_or_ignored():
      trained_model.load(run, {"best": "best", "last": "latest"}[kind])
    (run / name).write_bytes(content)
    checksums.write(run / place)


# Images and datasets.


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.pkl"])
def test_pickles_as_images_are_refused(name, pickled, tmp_path):
  (tmp_path / name).write_bytes(pickled)
  refused(image_files.read, tmp_path / name)


def archive(folder, members):
  with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return str(folder / "a.tar.gz")


def test_pickles_in_archives_are_refused(pickled, tmp_path, capsys):
  path = tmp_path / "cifar-10-binary.tar.gz"
  layout = untrusted_archive.LAYOUTS[0]
  size = layout.records["test_batch.bin"] * layout.record_bytes
  for content in (pickled, gzip.compress(pickled)):
    path.write_bytes(content)
    refused(untrusted_archive.check, str(path), untrusted_archive.LAYOUTS)
  for name, content in (
    # CIFAR's Python version consists of pickles.
    ("cifar-10-batches-py/data_batch_1", pickled),
    ("cifar-10-batches-bin/data_batch_1", pickled),
    ("cifar-10-batches-bin/test_batch.bin", pickled.ljust(size, b"\0")),
    ("cifar-10-batches-bin/batches.meta.txt", pickled),
  ):
    path = archive(tmp_path, {name: content})
    out = tmp_path / "out"
    assert prepare.main([f"--archive={path}", f"--data_dir={out}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_pickles_in_prepared_datasets_are_not_loaded(
  pickled, digits_dir, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  good = dataset.load("digits", str(digits_dir))
  files = [p for p in (digits_dir / "digits").rglob("*") if p.is_file()]
  assert {"dataset_info.json", "features.json"} < {p.name for p in files}
  for i, path in enumerate(files):
    folder = tmp_path / str(i)
    shutil.copytree(digits_dir / "digits", folder / "digits")
    (folder / path.relative_to(digits_dir)).write_bytes(pickled)
    with refused_or_ignored():
      found = dataset.load("digits", str(folder))
      np.testing.assert_array_equal(found.test.images, good.test.images)
    shutil.rmtree(folder)
  for path in (tmp_path / "cache").rglob("*.npz"):
    path.write_bytes(pickled)
  found = dataset.load("digits", str(digits_dir))
  np.testing.assert_array_equal(found.test.images, good.test.images)


def test_pickles_in_records_are_plain_bytes(pickled, tmp_path):
  path = tmp_path / "a.tfrecord"
  path.write_bytes(pickled)
  with pytest.raises(ValueError):
    list(tfrecord.read(path))
  path.write_bytes(tfrecord_frames.frame(pickled))
  assert [bytes(record) for record in tfrecord.read(path)] == [pickled]


# The code.


def test_no_module_can_load_a_pickle_or_run_text():
  files = [
    path
    for folder in ("rescalevit_jax", "scripts", "configs")
    for path in (paths.ROOT / folder).rglob("*.py")
  ]
  assert len(files) > 40
  for path in files:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      assert not faults(node), f"{path}:{node.lineno}"


LOADERS = {
  *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve"),
  *("marshal", "joblib", "jsonpickle"),
}


def faults(node):
  """Return True if a syntax-tree node could run code from a file."""
  if isinstance(node, ast.Import):
    return {alias.name.partition(".")[0] for alias in node.names} & LOADERS
  if isinstance(node, ast.ImportFrom):
    return (node.module or "").partition(".")[0] in LOADERS
  if isinstance(node, ast.Name):
    return node.id in ("eval", "exec", "__import__")
  if isinstance(node, ast.Attribute):
    return node.attr in LOADERS
  if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
    return not (isinstance(node.value, ast.Constant) and not node.value.value)
  return False


@pytest.mark.parametrize(
  "text",
  [
    "import pickle",
    "import os, dill as d",
    "from cloudpickle import loads",
    "import joblib.numpy_pickle",
    "eval('1')",
    "run = exec",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "np.compat.pickle.load(f)",
  ],
)
def test_the_check_detects_unsafe_code(text):
  assert any(map(faults, ast.walk(ast.parse(text))))
