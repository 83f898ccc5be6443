"""From tfds to arrays, and from (seed, step) to the indices of a batch."""

from collections.abc import Sequence
import dataclasses
import logging
import math

import numpy as np
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import array_cache
from rescalevit_jax.data import index_shuffle
from rescalevit_jax.data import records
from rescalevit_jax.data import tfds_builders

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Split:
  """Images with their labels, in memory.

  Attributes:
    images: uint8 [N, H, W, 3].
    labels: int32 [N], each at least 0 and below the number of classes.
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels of some places."""
    return self.images[indices], self.labels[indices]

  def at(self, places: np.ndarray) -> "Split":
    """Returns the split of the images at some places."""
    return Split(*self.read(places))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification data set.

  Attributes:
    name: as it was asked for.
    train: the split `train`, without what is held out.
    test: the split `test`, or `validation` where there is none; or what is held
      out of `train`.
    num_classes: number of classes.
    class_names: their names, in the order of the labels.
  """

  name: str
  train: Split | records.StreamedSplit
  test: Split | records.StreamedSplit
  num_classes: int
  class_names: tuple[str, ...]


def load(
  name: str,
  data_dir: str | None,
  *,
  source: str = "auto",
  max_gb: float = 4.0,
  image_size: int | None = None,
  num_val: int = 0,
) -> Dataset:
  """Opens a data set, after preparing it if that was not done before.

  The images and their order depend neither on the format of the prepared files
  (array_record or tfrecord) nor on `source`.

  Args:
    name: 'cifar10', 'cifar100', 'digits', or another tfds data set of images
      with one label each; greyscale becomes three equal channels.
    data_dir: where prepared data sets lie; None for tfds' own place.
    source: 'resident': all images are read now, and kept on disk as arrays, see
      `array_cache`; 'streaming': they are read when they are needed; 'auto':
      the first if they take at most `max_gb`.
    max_gb: 10^9 bytes.
    image_size: edge that images are resized to as they are read; None: they
      stay as they are, and must have one size.
    num_val: images of `train` to test with, drawn at random once and for all;
      they are not trained with, and the test images not looked at. 0: none.

  Raises:
    UserError: there is no such data set, it does not suit, it cannot be
      prepared, its files are damaged, or all of `train` would be held out.
  """
  builder = tfds_builders.open_builder(name, data_dir)
  records.check_features(builder, any_size=image_size is not None)
  if not tfds_builders.is_prepared(builder):
    tfds_builders.prepare(builder)
    builder = tfds_builders.open_builder(name, data_dir)
  splits = ("train", _test_split(builder))
  label = records.features(builder)[1]
  class_names = label.names or [str(i) for i in range(label.num_classes)]
  if len(class_names) != label.num_classes:
    raise errors.UserError(
      f"{builder.data_dir}: damaged, {len(class_names)} class names instead"
      f" of {label.num_classes}; remove this folder to prepare the data set"
      " anew"
    )
  if source == "auto":
    images = sum(builder.info.splits[split].num_examples for split in splits)
    shape = records.Decoder(builder, image_size).shape
    fits = images * math.prod(shape) <= max_gb * 1e9
    source = "resident" if fits else "streaming"
  read = records.StreamedSplit if source == "streaming" else _load_split
  train = read(builder, splits[0], image_size)
  if num_val:
    train, test = _hold_out(train, num_val, name)
  else:
    test = read(builder, splits[1], image_size)
  return Dataset(name, train, test, label.num_classes, tuple(class_names))


def indices(seed: int, step: int, batch: int, num_examples: int) -> np.ndarray:
  """Returns which examples a batch is made of: a pure function.

  The batches of steps 1, 2, ... are consecutive parts of one endless stream of
  epochs, each of which has every example once, in an order of its own.

  Args:
    seed: of the order, at least 0.
    step: from 1 on.
    batch: size of a batch; may be larger than `num_examples`.
    num_examples: size of the data set.

  Returns:
    int32 [batch], each at least 0 and below `num_examples`.
  """
  start, stop = (step - 1) * batch, step * batch
  parts = []
  for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
    first = epoch * num_examples
    places = np.arange(
      max(start - first, 0), min(stop - first, num_examples), dtype=np.int64
    )
    parts.append(index_shuffle.shuffle(places, num_examples, seed, epoch))
  return np.concatenate(parts)


def _hold_out(train, count, name):
  if count >= len(train):
    raise errors.UserError(
      f"config: data.num_val is {count}, but {name} has only {len(train)}"
      " training images"
    )
  # The same images whatever the run's seed, which is below 2^32.
  test = index_shuffle.shuffle(np.arange(count), len(train), 2**32, 0)
  is_test = np.zeros(len(train), bool)
  is_test[test] = True
  return train.at(np.flatnonzero(~is_test)), train.at(np.flatnonzero(is_test))


def _test_split(builder):
  for split in ("test", "validation"):
    if split in builder.info.splits and "train" in builder.info.splits:
      return split
  raise errors.UserError(
    f"data set {builder.name} has the splits"
    f" {', '.join(builder.info.splits) or '(none)'}: train and test (or"
    " validation) are needed"
  )


def _load_split(
  builder: tfds.core.DatasetBuilder, split: str, image_size: int | None
) -> Split:
  """Reads a split from the cache or, failing that, from its records."""
  decode = records.Decoder(builder, image_size)
  num_classes = records.features(builder)[1].num_classes
  count = builder.info.splits[split].num_examples
  name = builder.info.full_name.replace("/", "-")
  size = "" if image_size is None else f"-{image_size}"
  path = array_cache.folder(name, builder.data_dir) / f"{split}{size}.npz"
  arrays = array_cache.load(path)
  if arrays is not None:
    cached = Split(arrays.get("images"), arrays.get("labels"))
    if _is_sound(cached, (count, *decode.shape), num_classes):
      return cached
  _log.info("reading %s %s: %s images ...", builder.name, split, f"{count:,}")
  try:
    result = _decode_all(records.read_all(builder, split), decode, count)
  except Exception as e:  # Damaged files raise all sorts.
    raise errors.UserError(
      f"{builder.data_dir}: damaged, cannot read {split} ({errors.brief(e)});"
      " remove this folder to prepare the data set anew"
    ) from e
  if not _is_sound(result, result.images.shape, num_classes):
    raise errors.UserError(
      f"{builder.name} has examples without a label in its split {split}:"
      " choose a data set whose train and test images are all labelled"
    )
  array_cache.save(path, dataclasses.asdict(result))
  return result


def _is_sound(split, shape, num_classes):
  images, labels = split.images, split.labels
  return (
    images is not None
    and labels is not None
    and (images.shape, images.dtype) == (shape, np.uint8)
    and (labels.shape, labels.dtype) == (shape[:1], np.int32)
    and bool((labels >= 0).all() and (labels < num_classes).all())
  )


def _decode_all(found, decode, count):
  images = np.empty((count, *decode.shape), np.uint8)
  labels = np.empty(count, np.int32)
  done = 0
  for record in found:
    if done == count:
      raise ValueError(f"more than {count} examples")
    images[done], labels[done] = decode(record)
    done += 1
  if done < count:
    raise ValueError(f"{done} examples instead of {count}")
  return Split(images, labels)
