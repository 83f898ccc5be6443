"""Load image data sets from tfds, and compute the indices of a batch."""

from collections.abc import Sequence
import dataclasses
import logging
import math

from jaxtyping import Int32, UInt8
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
  """Images and labels in memory.

  Attributes:
    images: RGB images.
    labels: class indices.
  """

  images: UInt8[np.ndarray, "N H W 3"]
  labels: Int32[np.ndarray, " N"]

  def __len__(self) -> int:
    return len(self.labels)

  def read(
    self, indices: Sequence[int] | np.ndarray
  ) -> tuple[UInt8[np.ndarray, "B H W 3"], Int32[np.ndarray, " B"]]:
    """Return the images and labels at some indices."""
    return self.images[indices], self.labels[indices]

  def subset(self, indices: np.ndarray) -> "Split":
    """Return the split of the examples at some indices."""
    return Split(*self.read(indices))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification data set.

  Attributes:
    name: the requested name.
    train: the split `train`, without the images of a validation split.
    test: the validation split taken from `train` if `num_val` is set, otherwise
      the split `test`, or `validation` if there is no `test`.
    num_classes: number of classes.
    class_names: class names by label.
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
  """Load a data set; prepare it first if necessary.

  Images and their order are the same for both formats of prepared files
  (array_record, tfrecord) and for all values of `source`.

  Args:
    name: "cifar10", "cifar100", "digits", or another tfds data set of images
      with one label each. Greyscale becomes three equal channels.
    data_dir: folder of prepared data sets; None for the default of tfds.
    source: "resident": read all images now, and cache the arrays on disk, see
      `array_cache`; "streaming": read images from disk batch by batch; "auto":
      "resident" if the images take at most `max_gb`.
    max_gb: limit for "auto", in 10^9 bytes.
    image_size: edge to resize images to; None: no resizing, and all images must
      have one size.
    num_val: size of a validation split, which is taken from `train` and
      replaces the test images. The images are the same in every run. 0: none.

  Raises:
    UserError: the data set is unknown, not suitable, cannot be prepared or is
      damaged, or `num_val` leaves no training images.
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
      " again"
    )
  if source == "auto":
    images = sum(builder.info.splits[split].num_examples for split in splits)
    shape = records.Decoder(builder, image_size).shape
    fits = images * math.prod(shape) <= max_gb * 1e9
    source = "resident" if fits else "streaming"
  read = records.StreamedSplit if source == "streaming" else _load_split
  train = read(builder, splits[0], image_size)
  if num_val:
    train, test = _split_validation(train, num_val, name)
  else:
    test = read(builder, splits[1], image_size)
  return Dataset(name, train, test, label.num_classes, tuple(class_names))


def batch_indices(
  seed: int, step: int, batch: int, num_examples: int
) -> Int32[np.ndarray, " batch"]:
  """Return the indices of the examples in a batch, a pure function.

  The batches of steps 1, 2, ... are consecutive parts of an endless sequence of
  epochs. Each epoch has every example once, in a new random order.

  Args:
    seed: seed of the order, at least 0.
    step: training step, from 1.
    batch: batch size; may exceed `num_examples`.
    num_examples: size of the data set.
  """
  start, stop = (step - 1) * batch, step * batch
  parts = []
  for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
    first = epoch * num_examples
    positions = np.arange(
      max(start - first, 0), min(stop - first, num_examples), dtype=np.int64
    )
    parts.append(index_shuffle.shuffle(positions, num_examples, seed, epoch))
  return np.concatenate(parts)


def _split_validation(train, count, name):
  if count >= len(train):
    raise errors.UserError(
      f"config: data.num_val ({count}) leaves no training images: {name} has"
      f" {len(train)}; lower data.num_val"
    )
  # The seed of a run is below 2^32, so these images do not depend on it.
  indices = index_shuffle.shuffle(np.arange(count), len(train), 2**32, 0)
  is_val = np.zeros(len(train), bool)
  is_val[indices] = True
  return (
    train.subset(np.flatnonzero(~is_val)),
    train.subset(np.flatnonzero(is_val)),
  )


def _test_split(builder):
  for split in ("test", "validation"):
    if split in builder.info.splits and "train" in builder.info.splits:
      return split
  raise errors.UserError(
    f"dataset: {builder.name} lacks train and test (or validation); its"
    f" splits are {', '.join(builder.info.splits) or '(none)'}; choose another"
    " data set"
  )


def _load_split(
  builder: tfds.core.DatasetBuilder, split: str, image_size: int | None
) -> Split:
  """Load a split from the cache, or decode its records."""
  decode = records.Decoder(builder, image_size)
  num_classes = records.features(builder)[1].num_classes
  count = builder.info.splits[split].num_examples
  name = builder.info.full_name.replace("/", "-")
  size = "" if image_size is None else f"-{image_size}"
  path = array_cache.folder(name, builder.data_dir) / f"{split}{size}.npz"
  arrays = array_cache.load(path)
  if arrays is not None:
    empty = np.zeros(0)
    cached = Split(arrays.get("images", empty), arrays.get("labels", empty))
    if _is_valid(cached, (count, *decode.shape), num_classes):
      return cached
  _log.info("reading %s %s: %s images ...", builder.name, split, f"{count:,}")
  try:
    result = _decode_all(records.read_all(builder, split), decode, count)
  except Exception as e:  # Damaged files raise many types.
    raise errors.UserError(
      f"{builder.data_dir}: damaged, cannot read {split} ({errors.brief(e)});"
      " remove this folder to prepare the data set again"
    ) from e
  if not _is_valid(result, result.images.shape, num_classes):
    raise errors.UserError(
      f"dataset: {builder.name} has examples without a label in"
      f" {split}; choose a data set with labelled train and test images"
    )
  array_cache.save(path, dataclasses.asdict(result))
  return result


def _is_valid(split, shape, num_classes):
  images, labels = split.images, split.labels
  return (
    (images.shape, images.dtype) == (shape, np.uint8)
    and (labels.shape, labels.dtype) == (shape[:1], np.int32)
    and bool((labels >= 0).all() and (labels < num_classes).all())
  )


def _decode_all(encoded, decode, count):
  images = np.empty((count, *decode.shape), np.uint8)
  labels = np.empty(count, np.int32)
  done = 0
  for record in encoded:
    if done == count:
      raise ValueError(f"more than {count} examples")
    images[done], labels[done] = decode(record)
    done += 1
  if done < count:
    raise ValueError(f"{done} examples instead of {count}")
  return Split(images, labels)
