import os
import subprocess
import sys

import numpy as np
from sklearn import datasets

from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import digits


def test_digits_contain_every_image_of_scikit_learn_once(digits_dir):
  dataset = dataset_lib.load("digits", str(digits_dir))
  images, labels = datasets.load_digits(return_X_y=True)
  found = []
  for split in (dataset.train, dataset.test):
    gray = split.images[..., 0].reshape(-1, 64)
    for channel in (1, 2):
      np.testing.assert_array_equal(
        split.images[..., channel].reshape(-1, 64), gray
      )
    found += zip(map(bytes, gray), split.labels.tolist(), strict=True)
  # Convert bytes back to the 17 gray levels.
  expected = zip(
    map(bytes, (images * 255 / 16).round().astype(np.uint8)),
    labels.tolist(),
    strict=True,
  )
  assert sorted(found) == sorted(expected)


def test_splits_have_the_documented_sizes(digits_dir):
  dataset = dataset_lib.load("digits", str(digits_dir))
  assert len(dataset.train.labels) == 1437
  assert len(dataset.test.labels) == 360
  assert dataset.num_classes == 10
  assert dataset.class_names == tuple("0123456789")
  totals = np.bincount(
    np.concatenate([dataset.train.labels, dataset.test.labels])
  )
  share = np.bincount(dataset.test.labels) / totals
  assert (abs(share - 0.2) * totals < 1).all()


def test_test_split_matches_recorded_values():
  labels = datasets.load_digits().target
  indices = np.flatnonzero(digits.test_mask(labels))
  first = [3, 4, 10, 11, 13, 21, 24, 27, 28, 29, 30, 33]
  assert indices[:12].tolist() == first
  assert indices.sum() == 313941


def test_test_split_covers_all_writers():
  # scikit-learn sorts digits by writer; test images come from all parts.
  mask = digits.test_mask(datasets.load_digits().target)
  for part in np.array_split(mask, 12):
    assert 0.1 < part.mean() < 0.3


def test_digits_need_no_tensorflow(tmp_path):
  (tmp_path / "tensorflow.py").write_text("raise ImportError('not there')")
  program = (
    "from rescalevit_jax.data import dataset\n"
    f"d = dataset.load('digits', {str(tmp_path / 'tfds')!r})\n"
    "print(len(d.train.labels), len(d.test.labels))"
  )
  path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
  result = subprocess.run(
    [sys.executable, "-c", program],
    env={
      **os.environ,
      "PYTHONPATH": path,
      "XDG_CACHE_HOME": str(tmp_path / "cache"),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[-1] == "1437 360"
