import json
import os
import shutil
import subprocess
import sys

import fake_data
import numpy as np
import paths
import pytest
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import records
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.runtime import tensorflow_cpu

GOLDEN = [
  # seed, step, batch, examples, indices
  (0, 1, 5, 10, [5, 6, 8, 9, 0]),
  (0, 2, 5, 10, [3, 7, 2, 1, 4]),
  (0, 3, 5, 10, [5, 2, 3, 0, 1]),
  (1, 1, 5, 10, [9, 7, 4, 8, 6]),
  (7, 3, 4, 5, [3, 4, 3, 1]),
]


def stream(seed, batch, num_examples, steps):
  return np.concatenate(
    [
      dataset_lib.batch_indices(seed, s, batch, num_examples)
      for s in range(1, steps + 1)
    ]
  )


class TestIndices:
  @pytest.mark.parametrize("batch", [1, 7, 20, 23, 57, 100])
  def test_every_epoch_has_every_example_once(self, batch):
    epochs = stream(3, batch, 20, steps=200)[: 200 // 20 * 20].reshape(-1, 20)
    for epoch in epochs:
      assert sorted(epoch) == list(range(20))

  def test_batches_of_any_size_split_the_same_sequence(self):
    whole = stream(3, 20, 20, steps=15)
    for batch in (1, 7, 23, 57):
      steps = 300 // batch
      np.testing.assert_array_equal(
        stream(3, batch, 20, steps), whole[: steps * batch]
      )

  def test_indices_depend_only_on_arguments(self):
    steps = [9, 1, 40, 2, 9]
    first = [dataset_lib.batch_indices(5, s, 8, 21) for s in steps]
    dataset_lib.batch_indices(6, 3, 8, 21)
    for step, expected in zip(steps, first, strict=True):
      np.testing.assert_array_equal(
        dataset_lib.batch_indices(5, step, 8, 21), expected
      )

  def test_epochs_and_seeds_have_different_orders(self):
    orders = stream(0, 50, 50, steps=5).reshape(5, 50).tolist()
    orders += stream(1, 50, 50, steps=5).reshape(5, 50).tolist()
    assert len({tuple(order) for order in orders}) == 10

  @pytest.mark.parametrize("seed,step,batch,num_examples,expected", GOLDEN)
  def test_orders_match_recorded_values(
    self, seed, step, batch, num_examples, expected
  ):
    found = dataset_lib.batch_indices(seed, step, batch, num_examples)
    assert found.dtype == np.int32
    assert found.tolist() == expected


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  path = tmp_path / "cache"
  monkeypatch.setenv("XDG_CACHE_HOME", str(path))
  return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """Return a data_dir of prepared datasets; do not change it."""
  path = tmp_path_factory.mktemp("prepared")
  for name in (
    "fake",
    "fake_gray",
    "fake_validation",
    "fake_train_only",
    "fake_test_only",
    "fake_unlabeled",
    "fake_wrong_size",
    "fake_unpaired",
    "fake_image_to_text",
  ):
    tfds_builders.prepare(tfds_builders.open_builder(name, str(path)))
  return str(path)


@pytest.fixture
def own(prepared, tmp_path):
  """Return a copy of `prepared` to damage, and its folder of `fake`."""
  shutil.copytree(prepared, tmp_path / "own")
  return str(tmp_path / "own"), tmp_path / "own" / "fake" / "1.2.3"


def check_split(split, name, count, shape=(6, 5, 3)):
  assert split.images.shape == (count, *shape[:2], 3)
  assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
  ids = split.images[:, 0, 0, 0].tolist()
  assert sorted(ids) == list(range(count))
  for i, pixels, label in zip(ids, split.images, split.labels, strict=True):
    expected = np.broadcast_to(fake_data.image(name, i, shape), pixels.shape)
    np.testing.assert_array_equal(pixels, expected)
    assert label == fake_data.label(i)


def assert_equal(a, b):
  for split in ("train", "test"):
    x, y = getattr(a, split), getattr(b, split)
    np.testing.assert_array_equal(x.images, y.images)
    np.testing.assert_array_equal(x.labels, y.labels)


def refuses(name, data_dir, *words):
  with pytest.raises(errors.UserError) as info:
    dataset_lib.load(name, data_dir)
  message = str(info.value)
  assert "\n" not in message
  assert len(message) < 700
  for word in words:
    assert word in message


class TestLoad:
  @pytest.mark.parametrize(
    "name", ["fake", "fake_unpaired", "fake_image_to_text"]
  )
  def test_images_have_their_labels(self, prepared, name):
    dataset = dataset_lib.load(name, prepared)
    check_split(dataset.train, "train", 30)
    check_split(dataset.test, "test", 12)
    assert dataset.name == name
    assert dataset.num_classes == 4
    assert dataset.class_names == ("a", "b", "c", "d")

  def test_gray_becomes_three_equal_channels(self, prepared):
    dataset = dataset_lib.load("fake_gray", prepared)
    check_split(dataset.train, "train", 30, (6, 5, 1))
    check_split(dataset.test, "test", 12, (6, 5, 1))

  def test_validation_replaces_a_missing_test_split(self, prepared):
    dataset = dataset_lib.load("fake_validation", prepared)
    check_split(dataset.test, "validation", 12)

  def test_dataset_is_prepared_on_first_use(self, tmp_path):
    first = dataset_lib.load("fake", str(tmp_path / "new"))
    check_split(first.train, "train", 30)
    files = os.listdir(tmp_path / "new" / "fake" / "1.2.3")
    assert any("array_record" in name for name in files)

  def test_file_format_does_not_change_images(self, prepared, tmp_path):
    try:
      tensorflow_cpu.load()
    except errors.UserError as e:
      pytest.skip(str(e))
    builder = tfds_builders.open_builder("fake", str(tmp_path))
    # tf.data would interleave several shards.
    builder.download_and_prepare(
      file_format="tfrecord",
      download_config=tfds.download.DownloadConfig(num_shards=3),
    )
    files = os.listdir(tmp_path / "fake" / "1.2.3")
    assert sum("train.tfrecord" in name for name in files) == 3
    assert_equal(
      dataset_lib.load("fake", str(tmp_path)),
      dataset_lib.load("fake", prepared),
    )

  def test_images_are_read_without_tensorflow(self, prepared):
    program = (
      "import sys, fake_data\nfrom rescalevit_jax.data import dataset\n"
      f"dataset.load('fake', {prepared!r})\n"
      "assert 'tensorflow' not in sys.modules"
    )
    here = str(paths.HELPERS)
    subprocess.run(
      [sys.executable, "-c", program],
      env=os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])},
      check=True,
    )


class TestCache:
  @pytest.fixture
  def no_records(self, monkeypatch):
    def fail(self):
      yield next(iter(()))  # A reading error, not a test failure.

    return lambda: monkeypatch.setattr(records.TfdsExamples, "__iter__", fail)

  def test_second_start_uses_the_cache(self, prepared, no_records):
    first = dataset_lib.load("fake", prepared)
    no_records()
    assert_equal(dataset_lib.load("fake", prepared), first)

  def test_a_changed_folder_is_read_again(self, own, no_records):
    data_dir, folder = own
    dataset_lib.load("fake", data_dir)
    os.utime(folder / "dataset_info.json", ns=(0, 0))
    no_records()
    refuses("fake", data_dir, "cannot read train")

  @pytest.mark.parametrize(
    "damage", ["cut", "shape", "images", "labels", "missing"]
  )
  def test_a_damaged_file_is_written_again(
    self, prepared, cache, no_records, damage
  ):
    first = dataset_lib.load("fake", prepared)
    (path,) = cache.glob("rescalevit_jax/*/train.npz")
    arrays = dict(np.load(path))
    if damage == "cut":
      path.write_bytes(path.read_bytes()[:-100])
    elif damage == "shape":
      np.savez(path, **{k: v[:-1] for k, v in arrays.items()})
    elif damage == "images":
      np.savez(path, **arrays | {"images": arrays["images"][:, :-1]})
    elif damage == "labels":
      np.savez(path, **arrays | {"labels": arrays["labels"] + 4})
    else:
      np.savez(path, images=arrays["images"])
    assert_equal(dataset_lib.load("fake", prepared), first)
    no_records()
    assert_equal(dataset_lib.load("fake", prepared), first)

  def test_an_unwritable_cache_is_not_an_error(
    self, prepared, monkeypatch, tmp_path
  ):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check_split(dataset_lib.load("fake", prepared).train, "train", 30)


class TestRefuses:
  def test_images_of_several_sizes(self, tmp_path):
    refuses("fake_variable", str(tmp_path), "differ in size", "data.image_size")
    assert os.listdir(tmp_path) == []  # Reported before preparation.

  def test_no_class_label(self, tmp_path):
    words = ("class label", "image (Image)", "id (Text)")
    refuses("fake_unlabeled_text", str(tmp_path), *words)

  def test_images_of_16_bits(self, tmp_path):
    refuses("fake_deep", str(tmp_path), "uint16 [6, 5, 1]")

  def test_no_test_split(self, prepared):
    refuses("fake_train_only", prepared, "train, extra", "validation")

  def test_no_train_split(self, prepared):
    refuses("fake_test_only", prepared, "data.train_split", "has test;")

  def test_hidden_labels(self, prepared):
    refuses("fake_unlabeled", prepared, "test", "has no label", "test_split")

  def test_an_image_of_another_size(self, prepared):
    refuses("fake_wrong_size", prepared, ": record ", "[1, 1, 3]")

  def test_fewer_examples_than_described(self, own):
    data_dir, folder = own
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    (train,) = (s for s in info["splits"] if s["name"] == "train")
    train["shardLengths"] = ["31"]
    path.write_text(json.dumps(info))
    refuses("fake", data_dir, str(folder), "damaged", "remove this folder")

  @pytest.mark.parametrize("change,found", [(-1, "29 examples"), (1, "more")])
  def test_another_number_of_records(
    self, prepared, monkeypatch, change, found
  ):
    original = records.TfdsExamples.__iter__

    def read_all(self):
      whole = list(original(self))
      return iter(whole[:change] if change < 0 else whole + whole[:change])

    monkeypatch.setattr(records.TfdsExamples, "__iter__", read_all)
    refuses("fake", prepared, found, "damaged")

  @pytest.mark.parametrize("size", [0, 20_000, 100_000])
  def test_truncated_records(self, own, size):
    data_dir, folder = own
    (path,) = folder.glob("*train.array_record*")
    os.truncate(path, size)
    refuses("fake", data_dir, str(folder), "cannot read train", "remove")

  def test_missing_records(self, own):
    data_dir, folder = own
    next(folder.glob("*test.array_record*")).unlink()
    refuses("fake", data_dir, str(folder), "cannot read test", "remove")

  def test_changed_records(self, own):
    data_dir, folder = own
    (path,) = folder.glob("*train.array_record*")
    content = path.read_bytes()
    where = content.index(b"IHDR")
    path.write_bytes(content[:where] + b"iHDR" + content[where + 4 :])
    refuses("fake", data_dir, str(folder), "cannot read train", "remove")

  def test_truncated_class_names(self, tmp_path):
    dataset = dataset_lib.load("fake_named_late", str(tmp_path))
    assert dataset.class_names == ("a", "b", "c", "d")
    folder = tmp_path / "fake_named_late" / "1.2.3"
    (folder / "label.labels.txt").write_text("a\nb\n")
    refuses("fake_named_late", str(tmp_path), str(folder), "2 class names")
