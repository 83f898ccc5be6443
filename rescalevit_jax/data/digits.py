"""scikit-learn's handwritten digits as a tfds dataset: nothing to download."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Bool, Integer
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

_SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 grayscale images of 8x8 pixels in 10 classes.

  1,437 images are for training and 360, 20 % of each class, for testing. The
  split is the same on every machine.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # Read by tfds_builders.prepare. Images are passed as Pillow images, as tfds
  # would encode NumPy arrays with TensorFlow.
  NEEDS_TENSORFLOW = False

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "The handwritten digits that come with scikit-learn: the test part"
        " of the UCI dataset Optical Recognition of Handwritten Digits."
        " The 17 gray levels are scaled to 0 to 255."
      ),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1)),
          "label": tfds.features.ClassLabel(names=list("0123456789")),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://archive.ics.uci.edu/dataset/80",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    # A slow import, needed for preparing only.
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    is_test = test_mask(labels)
    return {
      "train": self._generate_examples(images, labels, ~is_test),
      "test": self._generate_examples(images, labels, is_test),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, mask: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in np.flatnonzero(mask).tolist():
      yield i, {"image": Image.fromarray(images[i]), "label": int(labels[i])}


def test_mask(labels: Integer[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
  """Return the mask of the test split: ceil(N / 5) images.

  It has every fifth image of each class, in a fixed random order.
  """
  # Raw bits are the same in all versions of numpy, permutations are not.
  bits = np.random.Philox(_SPLIT_SEED).random_raw(len(labels))
  mask = np.zeros(len(labels), bool)
  mask[np.lexsort((bits, labels))[::5]] = True
  return mask
