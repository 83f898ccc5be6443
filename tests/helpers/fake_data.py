"""Small tfds builders."""

import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

COUNTS = {"train": 30, "test": 12}


def image(split, i, shape=(6, 5, 3)):
  """Return the image of an example, identified by its first pixel."""
  rng = np.random.default_rng([len(split), i])
  pixels = rng.integers(0, 256, shape, np.uint8)
  pixels[0, 0, 0] = i
  return pixels


def label(i):
  return i * 7 % 4


class Fake(tfds.core.GeneratorBasedBuilder):
  """Random images of four classes; each subclass changes one property."""

  VERSION = tfds.core.Version("1.2.3")
  NEEDS_TENSORFLOW = False
  SHAPE = (6, 5, 3)
  COUNTS = COUNTS
  KEYS = ("image", "label")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=self.SHAPE),
          "label": tfds.features.ClassLabel(names=["a", "b", "c", "d"]),
          "id": tfds.features.Text(),
        }
      ),
      supervised_keys=self.KEYS,
    )

  def _split_generators(self, dl_manager):
    return {
      split: self._generate_examples(split, count)
      for split, count in self.COUNTS.items()
    }

  def _generate_examples(self, split, count):
    for i in range(count):
      yield i, self.example(split, i)

  def example(self, split, i):
    pixels = image(split, i, self.SHAPE)
    if self.SHAPE[-1] == 1:
      pixels = pixels[..., 0]
    return {"image": Image.fromarray(pixels), "label": label(i), "id": str(i)}


class FakeGray(Fake):
  SHAPE = (6, 5, 1)


class FakeValidation(Fake):
  COUNTS = {"train": 30, "validation": 12}


class FakeTrainOnly(Fake):
  COUNTS = {"train": 30, "extra": 12}


class FakeTestOnly(Fake):
  COUNTS = {"test": 12}


class FakeVariable(Fake):
  SHAPE = (None, None, 3)

  def example(self, split, i):
    pixels = image(split, i, (4 + i % 3, 9 - i % 5, 3))
    return {
      "image": Image.fromarray(pixels),
      "label": label(i),
      "id": str(i),
    }


class FakeUnpaired(Fake):
  KEYS = None


class FakeImageToText(Fake):
  """Has a label that is not among its supervised keys."""

  KEYS = ("image", "id")


class FakeUnlabeledText(Fake):
  """Has texts but no classes."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=self.SHAPE),
          "id": tfds.features.Text(),
        }
      ),
    )


class FakeDeep(Fake):
  """Has 16-bit images."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(6, 5, 1), dtype=np.uint16, encoding_format="png"
          ),
          "label": tfds.features.ClassLabel(num_classes=4),
        }
      ),
      supervised_keys=("image", "label"),
    )


class FakeNamedLate(Fake):
  """Reads its class names from its data, as CIFAR's builders do."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=self.SHAPE),
          "label": tfds.features.ClassLabel(num_classes=4),
        }
      ),
      supervised_keys=self.KEYS,
    )

  def _split_generators(self, dl_manager):
    self.info.features["label"].names = ["a", "b", "c", "d"]
    return super()._split_generators(dl_manager)

  def example(self, split, i):
    example = super().example(split, i)
    del example["id"]
    return example


class FakeUnlabeled(Fake):
  """Marks a missing label with -1, as many tfds test splits do."""

  def example(self, split, i):
    hidden = split == "test" and i == 3
    return super().example(split, i) | ({"label": -1} if hidden else {})


class FakeWrongSize(Fake):
  """Has one encoded image of a wrong size."""

  def example(self, split, i):
    shape = (1, 1, 3) if i == 7 else self.SHAPE
    file = io.BytesIO()
    Image.fromarray(image(split, i, shape)).save(file, "PNG")
    file.seek(0)
    return super().example(split, i) | {"image": file}


class FakeBroken(Fake):
  """Fails while tfds writes its test split."""

  def example(self, split, i):
    if split == "test" and i == 5:
      raise RuntimeError("first line\n  second line")
    return super().example(split, i)
