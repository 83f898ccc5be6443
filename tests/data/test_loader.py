"""Streamed and resident splits give equal batches."""

import threading

import fake_data
import jax
import numpy as np
from PIL import Image
import pytest

from rescalevit_jax import errors
from rescalevit_jax.analysis import subjects
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import image_files
from rescalevit_jax.data import loader
from rescalevit_jax.data import resident as resident_lib
from rescalevit_jax.data import streamed as streamed_lib
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.distributed import sharding
from rescalevit_jax.report import page
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.training import experiment
from rescalevit_jax.training import train


@pytest.fixture
def streamed(digits_dir):
  return dataset_lib.load("digits", str(digits_dir), source="streaming").train


@pytest.fixture
def resident(digits_dir):
  return dataset_lib.load("digits", str(digits_dir), source="resident").train


def plan(step):
  return dataset_lib.batch_indices(0, step, 48, 1437).reshape(3, 16)


def batches(split, numbers, plan=plan):
  with loader.Loader(split, sharding.create_mesh()).batches(
    plan, numbers
  ) as found:
    return [jax.device_get(batch) for batch in found]


# Steps 28 to 32, before and after the end of an epoch.
@pytest.mark.parametrize("numbers", [range(1, 4), range(28, 33), range(5, 5)])
def test_streamed_and_resident_batches_are_equal(resident, streamed, numbers):
  found, expected = batches(streamed, numbers), batches(resident, numbers)
  assert len(found) == len(expected) == len(numbers)
  for step, got, want in zip(numbers, found, expected, strict=True):
    for x, y in zip(got, want, strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(want[0], resident.images[plan(step)])
    np.testing.assert_array_equal(want[1], resident.labels[plan(step)])


def test_a_streamed_batch_is_read_without_previous_batches(
  streamed, monkeypatch
):
  wanted = []
  real = streamed_lib.StreamedSplit.read

  def read(self, indices):
    wanted.append(sorted(indices))
    return real(self, indices)

  monkeypatch.setattr(streamed_lib.StreamedSplit, "read", read)
  numbers = range(10**9, 10**9 + 3)
  assert len(batches(streamed, numbers)) == 3
  assert sorted(wanted) == sorted(sorted(plan(i).ravel()) for i in numbers)


def test_early_exit_stops_the_threads(streamed):
  before = threading.active_count()
  mesh = sharding.create_mesh()
  with loader.Loader(streamed, mesh).batches(plan, range(1, 10**6)) as found:
    next(found)
    assert threading.active_count() > before
  for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
      thread.join(10)
  assert threading.active_count() <= before


def test_an_unreadable_record_is_a_one_line_error(streamed, monkeypatch):
  def fail(content, resize):
    raise ValueError("first line\nsecond line")

  monkeypatch.setattr(image_files, "decode", fail)
  words = r"train.*record \d+: cannot be read .*first"
  with pytest.raises(errors.UserError, match=words):
    batches(streamed, range(1, 3))


def test_a_streamed_split_is_indexed_like_an_array(resident, streamed):
  assert len(streamed) == len(resident) == len(streamed.images)
  assert streamed.shape == resident.images.shape[1:]
  np.testing.assert_array_equal(streamed.images[7], resident.images[7])
  np.testing.assert_array_equal(streamed.images[-1], resident.images[-1])
  np.testing.assert_array_equal(streamed.images[1430:], resident.images[1430:])
  with pytest.raises(IndexError):
    streamed.images[1437]


@pytest.mark.parametrize(
  ("norm", "num_val"),
  [
    pytest.param("LN", 0, marks=pytest.mark.slow),
    ("Rescale", 100),
    pytest.param("Cal", 0, marks=pytest.mark.slow),
  ],
)
def test_streaming_a_large_dataset_gives_equal_runs(
  tiny_config, tmp_path, norm, num_val
):
  tiny_config.model.norm = norm
  tiny_config.data.num_val = num_val
  tiny_config.accum_steps = 3
  train.train_and_evaluate(tiny_config, tmp_path / "resident")
  tiny_config.data.max_gb = 1e-4  # The digits take 0.3 MB.
  train.train_and_evaluate(tiny_config, tmp_path / "streaming")
  lines = [
    (tmp_path / kind / "metrics.jsonl").read_bytes()
    for kind in ("resident", "streaming")
  ]
  assert lines[0] == lines[1]
  weights = [
    jax.tree.leaves(checkpoint.load_variables(tmp_path / kind, "latest")[:2])
    for kind in ("resident", "streaming")
  ]
  for x, y in zip(*weights, strict=True):
    np.testing.assert_array_equal(x, y)


def test_validation_images_are_removed_from_training(digits_dir):
  whole = dataset_lib.load("digits", str(digits_dir)).train

  def pixels(images):
    return sorted(image.tobytes() for image in images)

  for source in ("resident", "streaming"):
    dataset = dataset_lib.load(
      "digits", str(digits_dir), source=source, num_val=400
    )
    assert (len(dataset.train), len(dataset.test)) == (1037, 400)
    parts = [*dataset.train.images[:], *dataset.test.images[:]]
    assert pixels(parts) == pixels(whole.images)
    labels = dataset.test.read(range(400))[1]
    if source == "resident":
      first = dataset.test
      # Random images: each digit occurs about 40 times.
      assert np.bincount(labels, minlength=10).min() > 20
  np.testing.assert_array_equal(dataset.test.images[:], first.images)
  np.testing.assert_array_equal(labels, first.labels)


def test_a_validation_split_of_all_training_images_is_an_error(digits_dir):
  with pytest.raises(
    errors.UserError, match=r"num_val \(1437\) leaves.* has 1437"
  ):
    dataset_lib.load("digits", str(digits_dir), num_val=1437)


def test_memory_limit_selects_resident_or_streaming(digits_dir):
  kinds = [
    type(dataset_lib.load("digits", str(digits_dir), max_gb=max_gb).test)
    for max_gb in (3.4e-4, 3.5e-4)  # 1797 images of 8 x 8 x 3 bytes.
  ]
  assert kinds == [streamed_lib.StreamedSplit, resident_lib.Split]


def test_images_are_resized_during_reading(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  read = [
    dataset_lib.load(
      "fake_variable", str(tmp_path), source=source, image_size=6
    )
    for source in ("streaming", "resident", "resident")  # Last: cached.
  ]
  for split in ("train", "test"):
    first, *others = (getattr(dataset, split) for dataset in read)
    images, labels = first.read(range(len(first)))
    assert images.shape == (len(first), 6, 6, 3)
    for other in others:
      np.testing.assert_array_equal(images, other.images)
      np.testing.assert_array_equal(labels, other.labels)
  # Without resizing, the first pixel identifies the image; image 3 has 4 x 6
  # pixels.
  whole = fake_data.image("test", 3, (4, 6, 3))
  want = np.asarray(Image.fromarray(whole).resize((6, 6), Image.BILINEAR))
  found = read[0].test.images[:]
  assert (found == want).all(axis=(1, 2, 3)).sum() == 1


def test_streaming_refuses_tfrecord_files(tmp_path):
  builder = tfds_builders.open_builder("fake", str(tmp_path))
  builder.download_and_prepare(file_format="tfrecord")
  with pytest.raises(errors.UserError, match="tfrecord.*data.max_gb"):
    dataset_lib.load("fake", str(tmp_path), source="streaming")
  dataset_lib.load("fake", str(tmp_path))


class Half:
  """A sharding over 4 devices; this process has the devices 2 and 3."""

  def addressable_devices_indices_map(self, shape):
    part = shape[1] // 4
    return {i: (slice(None), slice(part * i, part * (i + 1))) for i in (3, 2)}


def test_a_process_reads_the_examples_of_its_devices():
  mesh = sharding.create_mesh()
  x = np.arange(24 * mesh.size).reshape(3, -1)
  place = sharding.split(mesh, axis=1)
  np.testing.assert_array_equal(sharding.local_shard(x, place), x)
  half = x.shape[1] // 2
  np.testing.assert_array_equal(sharding.local_shard(x, Half()), x[:, half:])


def test_all_commands_use_the_data_keys_of_a_run(tiny_config):
  tiny_config.data.image_size = 6
  assert experiment.load_dataset(tiny_config).test.images[3].shape == (6, 6, 3)
  (image,) = page.test_images([tiny_config], 3)
  assert image.shape == (6, 6, 3)
  source = ("digits", tiny_config.tfds_data_dir, (("image_size", 6),))
  assert subjects.test_split(*source).images[3].shape == (6, 6, 3)
