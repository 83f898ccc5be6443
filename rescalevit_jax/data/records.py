"""Read and decode the records of a prepared tfds data set.

Whole splits and single batches are decoded by the same code.
"""

from collections.abc import Iterator, Sequence
import copy
import io
import operator
import os

from jaxtyping import Int32, UInt8
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import tfrecord


def check_features(builder: tfds.core.DatasetBuilder, any_size: bool) -> None:
  """Check that a data set has images with one label each.

  Args:
    builder: builder of the data set, which need not be prepared.
    any_size: whether the images may differ in size.

  Raises:
    UserError: the data set is not suitable.
  """
  image, label = features(builder)
  if not (
    isinstance(image, tfds.features.Image)
    and isinstance(label, tfds.features.ClassLabel)
  ):
    raise errors.UserError(
      f"dataset: {builder.name} has no images with class labels; choose"
      " an image classification data set"
    )
  if None in image.shape[:2] and not any_size:
    raise errors.UserError(
      f"dataset: images of {builder.name} differ in size; resize them by"
      " data.image_size, such as 256, or choose a data set with images of one"
      " size, such as imagenet_resized/64x64"
    )
  if image.shape[-1] not in (1, 3) or image.np_dtype != np.uint8:
    raise errors.UserError(
      f"dataset: images of {builder.name} are {image.np_dtype.__name__}"
      f" {list(image.shape)}; choose a data set with uint8 images of 1 or 3"
      " channels"
    )


def features(builder: tfds.core.DatasetBuilder):
  """Return the features of image and label, None where missing."""
  found = dict(builder.info.features.items())
  return tuple(
    found.get(key) if isinstance(key, str) else None for key in _keys(builder)
  )


class Decoder:
  """A function from a record to an image and a label.

  Args:
    builder: builder of a data set that `check_features` accepts.
    image_size: edge to resize images to, as evaluation does; None: no resizing.

  Attributes:
    shape: shape of an image, (H, W, 3).
  """

  def __init__(self, builder: tfds.core.DatasetBuilder, image_size: int | None):
    self._image_key, self._label_key = _keys(builder)
    # Skip other features, and decode images with Pillow: tfds would use OpenCV
    # if installed, whose JPEG decoder differs.
    self._features = tfds.features.FeaturesDict(
      {key: builder.info.features[key] for key in _keys(builder)}
    )
    self._image_size = image_size
    self.shape = (*self._features[self._image_key].shape[:2], 3)
    if image_size is not None:
      self.shape = (image_size, image_size, 3)

  def __call__(
    self, record: bytes | memoryview
  ) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
    """Decode an image and its label.

    Raises:
      ValueError: the image does not have the data set's size.
      Exception: any type, if the record is damaged.
    """
    example = self._features.deserialize_example_np(
      record, decoders={self._image_key: tfds.decode.SkipDecoding()}
    )
    with Image.open(io.BytesIO(example[self._image_key])) as encoded:
      image = encoded.convert("RGB")
    if self._image_size is not None:
      image = image.resize(self.shape[:2], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    if pixels.shape != self.shape:
      raise ValueError(f"an image has shape {list(pixels.shape)}")
    return pixels, int(example[self._label_key])


def read_all(
  builder: tfds.core.DatasetBuilder, split: str
) -> Iterator[bytes | memoryview]:
  """Yield the serialized examples of a split in the order of its shards."""
  if builder.info.file_format.value == "tfrecord":
    for path in builder.info.splits[split].filepaths:
      yield from tfrecord.read(path)
    return
  yield from _open(builder, split)


class StreamedSplit:
  """A split whose images stay on disk; reading is thread-safe.

  Args:
    builder: builder of a prepared data set that `check_features` accepts.
    split: name of the split.
    image_size: see `Decoder`.

  Attributes:
    shape: shape of an image, (H, W, 3).

  Raises:
    UserError: the file format has no random access.
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    image_size: int | None,
  ):
    if builder.info.file_format.value != "array_record":
      raise errors.UserError(
        f"{builder.data_dir}: {builder.info.file_format.value} files have no"
        " random access; set data.max_gb to at least the data set's size in"
        " memory, or prepare it as array_record in another tfds_data_dir by"
        " rescalevit_jax.data.prepare"
      )
    self._decode = Decoder(builder, image_size)
    self._num_classes = features(builder)[1].num_classes
    self._where = f"{builder.data_dir}: {split}"
    self._records = _open(builder, split)
    self._indices: Sequence[int] | np.ndarray = range(len(self._records))
    self.shape = self._decode.shape

  def __len__(self) -> int:
    return len(self._indices)

  def subset(self, indices: np.ndarray) -> "StreamedSplit":
    """Return the split of the examples at some indices."""
    part = copy.copy(self)
    part._indices = indices
    return part

  def read(
    self, indices: Sequence[int] | np.ndarray
  ) -> tuple[UInt8[np.ndarray, "B H W 3"], Int32[np.ndarray, " B"]]:
    """Read the images and labels at some indices.

    Raises:
      UserError: a record is damaged or has no label.
    """
    images = np.empty((len(indices), *self.shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    try:
      for i, index in enumerate(indices):
        record = self._records[int(self._indices[index])]
        images[i], labels[i] = self._decode(record)
      if not ((labels >= 0) & (labels < self._num_classes)).all():
        raise ValueError("an example has no label")
    except Exception as e:  # Damaged files raise many types.
      raise errors.UserError(
        f"{self._where}: cannot be read ({errors.brief(e)}); remove this folder"
        " to prepare the data set again, or choose another one"
      ) from e
    return images, labels

  @property
  def images(self) -> "_Images":
    """The images, read on access by an index or a slice."""
    return _Images(self)


class _Images:
  """Images of a split on disk, indexed like an array."""

  def __init__(self, split):
    self._split = split

  def __len__(self):
    return len(self._split)

  def __getitem__(self, item: int | slice) -> np.ndarray:
    if isinstance(item, slice):
      return self._split.read(range(*item.indices(len(self))))[0]
    index = operator.index(item)
    if not -len(self) <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}")
    return self._split.read([index % len(self)])[0][0]


def _keys(builder):
  keys = builder.info.supervised_keys
  return keys if isinstance(keys, tuple) and len(keys) == 2 else (None, None)


def _open(builder, split):
  # A run with cached arrays does not need this import.
  from rescalevit_jax.data import array_record_files

  files = builder.info.splits[split].file_instructions
  return array_record_files.ArrayRecordFiles(
    [os.fspath(file.filename) for file in files], [file.take for file in files]
  )
