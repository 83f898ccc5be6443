"""From tfds to arrays, and from (seed, step) to the indices of a batch."""

from collections.abc import Iterator
import dataclasses
import functools
import io
import logging

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax import array_cache
from rescalevit_jax import builders
from rescalevit_jax import errors
from rescalevit_jax import tfrecord

_log = logging.getLogger(__name__)
_READ_AHEAD = 1000  # Records.


@dataclasses.dataclass(frozen=True)
class Split:
  """Images with their labels.

  Attributes:
    images: uint8 [N, H, W, 3].
    labels: int32 [N], each at least 0 and below the number of classes.
  """

  images: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification data set in memory.

  Attributes:
    name: as it was asked for.
    train: the split `train`.
    test: the split `test`, or `validation` where there is none.
    num_classes: number of classes.
    class_names: their names, in the order of the labels.
  """

  name: str
  train: Split
  test: Split
  num_classes: int
  class_names: tuple[str, ...]


def load(name: str, data_dir: str | None) -> Dataset:
  """Reads a data set, after preparing it if that was not done before.

  The arrays and their order do not depend on the format of the prepared files
  (array_record or tfrecord). They are kept on disk, see `array_cache`.

  Args:
    name: 'cifar10', 'cifar100', 'digits', or another tfds data set with images
      of one size and one label each; greyscale becomes three equal channels.
    data_dir: where prepared data sets lie; None for tfds' own place.

  Raises:
    UserError: there is no such data set, it does not suit, it cannot be
      prepared, or its files are damaged.
  """
  builder = builders.open_builder(name, data_dir)
  check_features(builder)
  if not builders.is_prepared(builder):
    builders.prepare(builder)
    builder = builders.open_builder(name, data_dir)
  test_split = _test_split(builder)
  label = _features(builder)[1]
  class_names = label.names or [str(i) for i in range(label.num_classes)]
  if len(class_names) != label.num_classes:
    raise errors.UserError(
      f"{builder.data_dir}: damaged, {len(class_names)} class names instead"
      f" of {label.num_classes}; remove this folder to prepare the data set"
      " anew"
    )
  return Dataset(
    name=name,
    train=_load_split(builder, "train"),
    test=_load_split(builder, test_split),
    num_classes=label.num_classes,
    class_names=tuple(class_names),
  )


def check_features(builder: tfds.core.DatasetBuilder) -> None:
  """Checks that a data set has images of one size, with one label each.

  Args:
    builder: of the data set, which need not be prepared.

  Raises:
    UserError: it does not suit.
  """
  image, label = _features(builder)
  if not (
    isinstance(image, tfds.features.Image)
    and isinstance(label, tfds.features.ClassLabel)
  ):
    raise errors.UserError(
      f"data set {builder.name} has no pair of an image and a class label:"
      " choose an image classification data set"
    )
  if None in image.shape:
    raise errors.UserError(
      f"the images of {builder.name} differ in size: choose a data set with"
      " images of one size, such as imagenet_resized/64x64"
    )
  if image.shape[-1] not in (1, 3) or image.np_dtype != np.uint8:
    raise errors.UserError(
      f"the images of {builder.name} are {image.np_dtype.__name__}"
      f" {list(image.shape)}: choose a data set with uint8 images of 1 or 3"
      " channels"
    )


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
  start = (step - 1) * batch
  epochs = range(start // num_examples, (start + batch - 1) // num_examples + 1)
  stream = np.concatenate([_order(seed, e, num_examples) for e in epochs])
  offset = start % num_examples
  return stream[offset : offset + batch]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  # Sorting raw bits: numpy promises these for all its versions, while the
  # algorithm of Generator.permutation may change.
  bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
  order = np.argsort(bits.random_raw(num_examples), kind="stable")
  return order.astype(np.int32)


def _features(builder):
  """Returns the features of the image and of the label; None for no such."""
  keys = builder.info.supervised_keys
  if not isinstance(keys, tuple) or len(keys) != 2:
    return None, None
  features = dict(builder.info.features.items())
  return tuple(
    features.get(key) if isinstance(key, str) else None for key in keys
  )


def _test_split(builder):
  for split in ("test", "validation"):
    if split in builder.info.splits and "train" in builder.info.splits:
      return split
  raise errors.UserError(
    f"data set {builder.name} has the splits"
    f" {', '.join(builder.info.splits) or '(none)'}: train and test (or"
    " validation) are needed"
  )


def _load_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
  """Reads a split from the cache or, failing that, from its records."""
  image, label = _features(builder)
  count = builder.info.splits[split].num_examples
  name = builder.info.full_name.replace("/", "-")
  path = array_cache.folder(name, builder.data_dir) / f"{split}.npz"
  arrays = array_cache.load(path)
  if arrays is not None:
    cached = Split(arrays.get("images"), arrays.get("labels"))
    if _is_sound(cached, (count, *image.shape[:2], 3), label.num_classes):
      return cached
  _log.info("reading %s %s: %s images ...", builder.name, split, f"{count:,}")
  try:
    result = _decode(builder, split, count)
  except Exception as e:  # Damaged files raise all sorts.
    reason = " ".join(str(e).split())[:200] or type(e).__name__
    raise errors.UserError(
      f"{builder.data_dir}: damaged, cannot read {split} ({reason}); remove"
      " this folder to prepare the data set anew"
    ) from e
  if not _is_sound(result, result.images.shape, label.num_classes):
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


def _decode(builder: tfds.core.DatasetBuilder, split: str, count: int) -> Split:
  features = builder.info.features
  image_key, label_key = builder.info.supervised_keys
  # Leaves other features alone, and images to Pillow: tfds would take OpenCV
  # where it is installed, whose JPEG decoder differs.
  features = tfds.features.FeaturesDict(
    {key: features[key] for key in (image_key, label_key)}
  )
  decoders = {image_key: tfds.decode.SkipDecoding()}
  images = np.empty((count, *features[image_key].shape[:2], 3), np.uint8)
  labels = np.empty(count, np.int32)
  found = 0
  for record in _records(builder, split):
    if found == count:
      raise ValueError(f"more than {count} examples")
    example = features.deserialize_example_np(record, decoders=decoders)
    with Image.open(io.BytesIO(example[image_key])) as image:
      pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != images.shape[1:]:
      raise ValueError(f"example {found} is an image {list(pixels.shape)}")
    images[found] = pixels
    labels[found] = example[label_key]
    found += 1
  if found < count:
    raise ValueError(f"{found} examples instead of {count}")
  return Split(images, labels)


def _records(
  builder: tfds.core.DatasetBuilder, split: str
) -> Iterator[bytes | memoryview]:
  """Yields the serialised examples of a split in the order of its shards."""
  if builder.info.file_format.value == "tfrecord":
    for path in builder.info.splits[split].filepaths:
      yield from tfrecord.read(path)
    return
  source = builder.as_data_source(
    split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  for start in range(0, len(source), _READ_AHEAD):
    stop = min(start + _READ_AHEAD, len(source))
    yield from source.__getitems__(list(range(start, stop)))
