"""Read the records of a prepared tfds dataset."""

from collections.abc import Iterator
import functools
import os

import numpy as np
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import tfrecord


def check_features(builder: tfds.core.DatasetBuilder, any_size: bool) -> None:
  """Raise UserError unless a dataset has images with one label each.

  The dataset need not be prepared. Images may differ in size if `any_size`.
  """
  image, label = features(builder)
  if image is None or label is None:
    found = ", ".join(
      f"{name} ({type(feature).__name__})"
      for name, feature in builder.info.features.items()
    )
    raise errors.UserError(
      f"dataset: {builder.name} has no images with class labels; its features"
      f" are {found or 'unnamed'}; choose an image classification dataset"
    )
  if image.shape[-1] not in (1, 3, 4) or image.np_dtype != np.uint8:
    raise errors.UserError(
      f"dataset: images of {builder.name} are {image.np_dtype.__name__}"
      f" {list(image.shape)}; choose a dataset with uint8 images of 1, 3 or 4"
      " channels"
    )
  if None in image.shape[:2] and not any_size:
    raise errors.UserError(
      f"dataset: images of {builder.name} differ in size; resize them by"
      " data.image_size, such as 256, or choose a dataset with images of one"
      " size, such as imagenet_resized/64x64"
    )


def features(builder: tfds.core.DatasetBuilder):
  """Return the features of image and label, None where missing."""
  return tuple(key and builder.info.features[key] for key in keys(builder))


def keys(builder: tfds.core.DatasetBuilder) -> tuple[str | None, str | None]:
  """Find the names of the image and of the label.

  They are the supervised keys of the dataset, or its only image and its only
  class label.
  """

  def of_type(kind):
    features = builder.info.features.items()
    return [name for name, x in features if isinstance(x, kind)]

  images = of_type(tfds.features.Image)
  labels = of_type(tfds.features.ClassLabel)
  supervised = builder.info.supervised_keys
  if supervised is not None and len(supervised) == 2:
    image, label = supervised
    if image in images and label in labels:
      return image, label
  return (
    images[0] if len(images) == 1 else None,
    labels[0] if len(labels) == 1 else None,
  )


class TfdsExamples:
  """The encoded images of a stored split, with their labels.

  The dataset is prepared, and `check_features` accepts it.
  """

  def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
    self._image_key, self._label_key = keys(builder)
    # Skip other features, and decode images with Pillow: tfds would use OpenCV
    # if installed, whose JPEG decoder differs.
    self._features = tfds.features.FeaturesDict(
      {key: builder.info.features[key] for key in keys(builder)}
    )
    self._info = builder.info.splits[split]
    self._format = builder.info.file_format.value
    self._paths = [
      os.fspath(file.filename) for file in self._info.file_instructions
    ]
    self._counts = [file.take for file in self._info.file_instructions]
    self._data_dir = builder.data_dir

  def __len__(self) -> int:
    return self._info.num_examples

  def check_random_access(self) -> None:
    """Raise UserError if single records cannot be read."""
    if self._format != "array_record":
      raise errors.UserError(
        f"{self._data_dir}: {self._format} files have no random access; set"
        " data.max_gb to at least the dataset's size in memory, or prepare it"
        " as array_record in another tfds_data_dir by"
        " rescalevit_jax.data.prepare"
      )

  def __getitem__(self, index: int) -> tuple[bytes, int]:
    """Return an encoded image and its label; -1 if it has none."""
    return self._parse(self._array_records[index])

  def __iter__(self) -> Iterator[tuple[bytes, int]]:
    """Yield all examples in the order of the files."""
    if self._format == "tfrecord":
      for path in self._info.filepaths:
        yield from map(self._parse, tfrecord.read(path))
    else:
      yield from map(self._parse, self._array_records)

  def where(self, index: int) -> str:
    """Describe the location of an example: file and record."""
    for path, count in zip(self._paths, self._counts, strict=True):
      if index < count:
        return f"{path}: record {index}"
      index -= count
    return f"{self._data_dir}: record {index} after the last"

  @functools.cached_property
  def _array_records(self):
    # A run with cached arrays does not need this import.
    from rescalevit_jax.data import array_record_files

    return array_record_files.ArrayRecordFiles(self._paths, self._counts)

  def _parse(self, record):
    example = self._features.deserialize_example_np(
      record, decoders={self._image_key: tfds.decode.SkipDecoding()}
    )
    return bytes(example[self._image_key]), int(example[self._label_key])
