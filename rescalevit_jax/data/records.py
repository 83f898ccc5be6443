"""The records of a prepared tfds data set: images with their labels.

One decoder for all that reads them, so that it makes no difference whether a
split is read as a whole or a batch at a time.
"""

from collections.abc import Iterator, Sequence
import copy
import io
import operator
import os

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import tfrecord


def check_features(builder: tfds.core.DatasetBuilder, any_size: bool) -> None:
  """Checks that a data set has images, with one label each.

  Args:
    builder: of the data set, which need not be prepared.
    any_size: whether the images may differ in size.

  Raises:
    UserError: it does not suit.
  """
  image, label = features(builder)
  if not (
    isinstance(image, tfds.features.Image)
    and isinstance(label, tfds.features.ClassLabel)
  ):
    raise errors.UserError(
      f"data set {builder.name} has no pair of an image and a class label:"
      " choose an image classification data set"
    )
  if None in image.shape[:2] and not any_size:
    raise errors.UserError(
      f"the images of {builder.name} differ in size: set data.image_size, such"
      " as 256, to have all of them resized, or choose a data set with images"
      " of one size, such as imagenet_resized/64x64"
    )
  if image.shape[-1] not in (1, 3) or image.np_dtype != np.uint8:
    raise errors.UserError(
      f"the images of {builder.name} are {image.np_dtype.__name__}"
      f" {list(image.shape)}: choose a data set with uint8 images of 1 or 3"
      " channels"
    )


def features(builder: tfds.core.DatasetBuilder):
  """Returns the features of the image and of the label; None for no such."""
  found = dict(builder.info.features.items())
  return tuple(
    found.get(key) if isinstance(key, str) else None for key in _keys(builder)
  )


class Decoder:
  """Turns records into arrays.

  Args:
    builder: of a data set that suits, see `check_features`.
    image_size: edge S that images are resized to, whatever their shape, as
      evaluation does; None: they stay as they are.

  Attributes:
    shape: of an image, (H, W, 3).
  """

  def __init__(self, builder: tfds.core.DatasetBuilder, image_size: int | None):
    self._image_key, self._label_key = _keys(builder)
    # Leaves other features alone, and images to Pillow: tfds would take OpenCV
    # where it is installed, whose JPEG decoder differs.
    self._features = tfds.features.FeaturesDict(
      {key: builder.info.features[key] for key in _keys(builder)}
    )
    self._image_size = image_size
    self.shape = (*self._features[self._image_key].shape[:2], 3)
    if image_size is not None:
      self.shape = (image_size, image_size, 3)

  def __call__(self, record: bytes | memoryview) -> tuple[np.ndarray, int]:
    """Returns an image, uint8 [H, W, 3], and its label.

    Raises:
      ValueError: the image is not of the size that the data set says.
      Exception: of many kinds, if the record is damaged.
    """
    example = self._features.deserialize_example_np(
      record, decoders={self._image_key: tfds.decode.SkipDecoding()}
    )
    with Image.open(io.BytesIO(example[self._image_key])) as image:
      image = image.convert("RGB")
    if self._image_size is not None:
      image = image.resize(self.shape[:2], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    if pixels.shape != self.shape:
      raise ValueError(f"an image is {list(pixels.shape)}")
    return pixels, int(example[self._label_key])


def read_all(
  builder: tfds.core.DatasetBuilder, split: str
) -> Iterator[bytes | memoryview]:
  """Yields the serialised examples of a split in the order of its shards."""
  if builder.info.file_format.value == "tfrecord":
    for path in builder.info.splits[split].filepaths:
      yield from tfrecord.read(path)
    return
  yield from _open(builder, split)


class StreamedSplit:
  """A split whose images stay on disk; safe to read in several threads.

  Args:
    builder: of a prepared data set that suits.
    split: its name.
    image_size: see `Decoder`.

  Attributes:
    shape: of an image, (H, W, 3).

  Raises:
    UserError: it was prepared in a format that cannot be read in any order.
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    image_size: int | None,
  ):
    if builder.info.file_format.value != "array_record":
      raise errors.UserError(
        f"{builder.data_dir}: prepared as {builder.info.file_format.value},"
        " which can only be read as a whole: set data.max_gb to at least"
        " its size in memory, or prepare it as array_record in another"
        " tfds_data_dir by rescalevit_jax.data.prepare"
      )
    self._decode = Decoder(builder, image_size)
    self._num_classes = features(builder)[1].num_classes
    self._where = f"{builder.data_dir}: {split}"
    self._records = _open(builder, split)
    self._places = range(len(self._records))
    self.shape = self._decode.shape

  def __len__(self) -> int:
    return len(self._places)

  def at(self, places: np.ndarray) -> "StreamedSplit":
    """Returns the split of the images at some places."""
    part = copy.copy(self)
    part._places = places
    return part

  def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads examples.

    Args:
      indices: [B], their places in the split.

    Returns:
      Images, uint8 [B, H, W, 3], and labels, int32 [B].

    Raises:
      UserError: a record is damaged or has no label.
    """
    images = np.empty((len(indices), *self.shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    try:
      for i, index in enumerate(indices):
        record = self._records[int(self._places[index])]
        images[i], labels[i] = self._decode(record)
      if not ((labels >= 0) & (labels < self._num_classes)).all():
        raise ValueError("an example has no label")
    except Exception as e:  # Damaged files raise all sorts.
      raise errors.UserError(
        f"{self._where}: cannot be read ({errors.brief(e)}); remove this folder"
        " to prepare the data set anew, or choose another one"
      ) from e
    return images, labels

  @property
  def images(self) -> "_Images":
    """The images alone, read when asked for: by a place or a slice."""
    return _Images(self)


class _Images:
  """What an array of all images would be."""

  def __init__(self, split):
    self._split = split

  def __len__(self):
    return len(self._split)

  def __getitem__(self, places: int | slice) -> np.ndarray:
    if isinstance(places, slice):
      return self._split.read(range(*places.indices(len(self))))[0]
    place = operator.index(places)
    if not -len(self) <= place < len(self):
      raise IndexError(f"image {place} of {len(self)}")
    return self._split.read([place % len(self)])[0][0]


def _keys(builder):
  keys = builder.info.supervised_keys
  return keys if isinstance(keys, tuple) and len(keys) == 2 else (None, None)


def _open(builder, split):
  # Not needed by a run whose arrays are in the cache.
  from rescalevit_jax.data import array_record_files

  files = builder.info.splits[split].file_instructions
  return array_record_files.ArrayRecordFiles(
    [os.fspath(file.filename) for file in files], [file.take for file in files]
  )
