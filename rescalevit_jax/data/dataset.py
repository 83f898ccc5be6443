"""Load image datasets from tfds, and compute the indices of a batch."""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
import time
from typing import Any

from jaxtyping import Int32, UInt8
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import array_cache
from rescalevit_jax.data import folder
from rescalevit_jax.data import image_files
from rescalevit_jax.data import index_shuffle
from rescalevit_jax.data import records
from rescalevit_jax.data import splits
from rescalevit_jax.data import streamed
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)
_CHUNK = 256  # Images that are decoded in parallel.
_MAX_THREADS = 16
_SECONDS_BETWEEN_LINES = 10.0


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
  """An image classification dataset.

  Attributes:
    name: the requested name.
    train: training images, without those of a validation split.
    test: images to evaluate on.
    num_classes: number of classes.
    class_names: class names by label.
    test_split: the evaluated split in tfds' notation; with a validation split
      "train" and its size, such as "train (5000 held out)".
    num_skipped: damaged images that were left out.
  """

  name: str
  train: Split | streamed.StreamedSplit
  test: Split | streamed.StreamedSplit
  num_classes: int
  class_names: tuple[str, ...]
  test_split: str = "test"
  num_skipped: int = 0


def load(
  name: str,
  data_dir: str | None,
  *,
  train_split: str = "train",
  test_split: str | None = None,
  source: str = "auto",
  max_gb: float = 4.0,
  image_size: int | None = None,
  resize: str = "squash",
  crop_ratio: float = 0.875,
  num_val: int = 0,
  skip_damaged: bool = False,
) -> Dataset:
  """Load a dataset; prepare it first if necessary.

  Images and their order are the same for both formats of prepared files
  (array_record, tfrecord) and for all values of `source`.

  Args:
    name: "cifar10", "cifar100", "digits", another tfds dataset of images with
      one label each, or "folder:PATH" for a folder of image files.
    data_dir: folder of prepared datasets; None for the default of tfds.
    train_split: split to train on, in tfds' notation, such as "train[:10%]".
    test_split: split to evaluate on; None: "test", or "validation" if there is
      no test split with labels.
    source: "resident": read all images now, and cache the arrays on disk, see
      `array_cache`; "streaming": read images from disk batch by batch; "auto":
      "resident" if the images take at most `max_gb`.
    max_gb: limit for "auto", in 10^9 bytes.
    image_size: edge to resize images to; None: no resizing, and all images must
      have one size.
    resize: see `image_files.Resize`.
    crop_ratio: see `image_files.Resize`.
    num_val: size of a validation split, which is taken from the training images
      and replaces the test images. The images are the same in every run. 0:
      none.
    skip_damaged: leave out images that cannot be read.

  Raises:
    UserError: the dataset is unknown, not suitable, cannot be prepared or is
      damaged, or `num_val` leaves no training images.
  """
  first_resize = image_files.Resize(image_size, resize, crop_ratio)
  stored = _open(name, data_dir, first_resize)
  train_parts = splits.resolve(
    train_split, stored.sizes, "data.train_split", name
  )
  tests = {} if num_val else _candidates(stored, test_split, name)
  if source == "auto":
    images = sum(
      stored.sizes[split]
      for split in {x.split for x in sum(tests.values(), train_parts)}
    )
    fits = images * math.prod(stored.shape) <= max_gb * 1e9
    source = "resident" if fits else "streaming"
  if source == "streaming" and skip_damaged:
    raise errors.UserError(
      "config: data.skip_damaged needs all images in memory; set"
      " data.source=resident, or remove damaged images"
    )
  read = _streamed if source == "streaming" else _resident
  train, num_skipped = read(stored, train_parts, first_resize, skip_damaged)
  if num_val:
    train, test = _split_validation(train, num_val, name)
    chosen = f"{train_split} ({num_val} held out)"
  else:
    test, chosen, skipped = _first_labelled(
      tests, functools.partial(read, stored), first_resize, skip_damaged, name
    )
    num_skipped += skipped
  if num_skipped:
    _log.warning("left out %d damaged images", num_skipped)
  return Dataset(
    name,
    train,
    test,
    len(stored.class_names),
    stored.class_names,
    chosen,
    num_skipped,
  )


def load_test(
  name: str,
  data_dir: str | None,
  *,
  test_split: str | None = None,
  image_size: int | None = None,
  resize: str = "squash",
  crop_ratio: float = 0.875,
  skip_damaged: bool = False,
  **others: Any,
) -> tuple[Split, str, tuple[str, ...]]:
  """Load only the test split of a dataset, into memory.

  Args:
    name: see `load`.
    data_dir: see `load`.
    test_split: see `load`.
    image_size: see `load`.
    resize: see `load`.
    crop_ratio: see `load`.
    skip_damaged: see `load`.
    **others: the other arguments of `load`, which have no effect.

  Returns:
    The split, its name and the class names.

  Raises:
    UserError: see `load`.
  """
  del others
  first_resize = image_files.Resize(image_size, resize, crop_ratio)
  stored = _open(name, data_dir, first_resize)
  tests = _candidates(stored, test_split, name)
  test, chosen, _ = _first_labelled(
    tests,
    functools.partial(_resident, stored),
    first_resize,
    skip_damaged,
    name,
  )
  return test, chosen, stored.class_names


def expand(name: str, data_dir: str | None) -> list[str]:
  """Return the datasets that NAME/* stands for: all configs of NAME.

  Raises:
    UserError: the dataset is unknown or has no configs.
  """
  base, star, rest = name.rpartition("/*")
  if not star or rest:
    return [name]
  configs = tfds_builders.config_names(base, data_dir)
  if not configs:
    raise errors.UserError(
      f"config: eval_dataset ({name}): {base} has no configs; leave out /*"
    )
  return [f"{base}/{config}" for config in configs]


def is_prepared(name: str, data_dir: str | None) -> bool:
  """Return whether a dataset can be loaded without preparing it.

  Raises:
    UserError: the dataset is unknown.
  """
  if name.startswith(folder.PREFIX):
    return True
  return tfds_builders.is_prepared(tfds_builders.open_builder(name, data_dir))


def describe(
  name: str, data_dir: str | None, resize: image_files.Resize
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
  """Return the shape of an image and the class names, without preparing.

  Raises:
    UserError: the dataset is unknown or not suitable.
  """
  if name.startswith(folder.PREFIX):
    stored = _open_folder(name, resize)
    return stored.shape, stored.class_names
  builder = tfds_builders.open_builder(name, data_dir)
  records.check_features(builder, any_size=resize.image_size is not None)
  image, label = records.features(builder)
  return image_shape(image.shape, resize), _class_names(label)


def _class_names(label):
  return tuple(label.names or map(str, range(label.num_classes)))


def _first_labelled(tests, read, first_resize, skip_damaged, name):
  """Read the first of some splits that has labels."""
  for i, (split, parts) in enumerate(tests.items()):
    try:
      test, skipped = read(parts, first_resize, skip_damaged)
      return test, split, skipped
    except streamed.UnlabelledError:
      if i == len(tests) - 1:
        raise
      _log.warning(
        "%s: its split %s has no labels; evaluating on the next one",
        name,
        split,
      )
  raise AssertionError


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
    num_examples: size of the dataset.
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


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A dataset on disk.

  Attributes:
    name: for the log and the cache.
    source: folder of its files.
    examples: by split.
    shape: shape of an image after the first resizing.
    class_names: class names by label.
    files: of a folder, whose names give the labels; None for tfds.
  """

  name: str
  source: str
  examples: dict[str, Any]
  shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  files: Sequence[pathlib.Path] | None = None

  @property
  def sizes(self) -> dict[str, int]:
    """Number of examples by split."""
    return {split: len(x) for split, x in self.examples.items()}

  def cache_folder(self) -> pathlib.Path:
    """Return the folder of the cached arrays."""
    name = self.name.replace("/", "-")
    if self.files is None:
      return array_cache.folder(name, self.source)
    return array_cache.folder(name, self.source, self.files, self.class_names)


def _open(name, data_dir, resize):
  if name.startswith(folder.PREFIX):
    return _open_folder(name, resize)
  return _open_tfds(name, data_dir, resize)


def _candidates(stored, test_split, name):
  """Return the parts of the possible test splits, by name, the best first."""
  usual = ["test", "validation"] if test_split is None else [test_split]
  found = [x for x in usual if test_split or x in stored.sizes]
  if not found:
    raise errors.UserError(
      f"dataset: {name} has no split test or validation; its splits are"
      f" {', '.join(stored.sizes) or '(none)'}; choose one by data.test_split,"
      " or hold out training images by data.num_val"
    )
  return {
    x: splits.resolve(x, stored.sizes, "data.test_split", name) for x in found
  }


def _open_tfds(name, data_dir, resize):
  shape, _ = describe(name, data_dir, resize)
  builder = tfds_builders.open_builder(name, data_dir)
  if not tfds_builders.is_prepared(builder):
    tfds_builders.prepare(builder)
    builder = tfds_builders.open_builder(name, data_dir)
  label = records.features(builder)[1]
  class_names = _class_names(label)
  if len(class_names) != label.num_classes:
    raise errors.UserError(
      f"{builder.data_dir}: damaged, {len(class_names)} class names instead"
      f" of {label.num_classes}; remove this folder to prepare the dataset"
      " again"
    )
  return _Stored(
    builder.info.full_name,
    str(builder.data_dir),
    {
      split: records.TfdsExamples(builder, split)
      for split in builder.info.splits
    },
    shape,
    class_names,
  )


def image_shape(
  shape: Sequence[int], resize: image_files.Resize
) -> tuple[int, int, int]:
  """Return the shape of an image after the first resizing."""
  size = resize.image_size
  return (shape[0], shape[1], 3) if size is None else (size, size, 3)


def _open_folder(name, resize):
  path = pathlib.Path(name.removeprefix(folder.PREFIX)).expanduser()
  examples, class_names = folder.open_folder(path)
  shape = (0, 0, 3)
  if resize.image_size is None:  # Then all images must be like the first one.
    first = next(iter(examples.values()))
    try:
      shape = image_files.decode(first[0][0], resize).shape
    except Exception as e:  # Damaged files raise many types.
      raise errors.UserError(
        f"{first.where(0)}: cannot be read ({errors.brief(e)}); remove it, or"
        " set data.image_size and data.skip_damaged"
      ) from e
  return _Stored(
    path.resolve().name,
    str(path),
    examples,
    image_shape(shape, resize),
    class_names,
    [file for split in examples.values() for file in split.files],
  )


def _streamed(stored, parts, resize, skip_damaged):
  """Return a split that stays on disk, and 0 skipped images."""
  del skip_damaged
  for part in parts:
    examples = stored.examples[part.split]
    if hasattr(examples, "check_random_access"):
      examples.check_random_access()
  split = streamed.StreamedSplit(
    [
      (stored.examples[part.split], range(part.start, part.stop))
      for part in parts
    ],
    stored.shape,
    resize,
    len(stored.class_names),
  )
  split.read([0])  # Finds a split without labels before the run starts.
  return split, 0


def _resident(stored, parts, resize, skip_damaged):
  """Read a split into memory; return it and the number of skipped images."""
  found, num_skipped = [], 0
  for part in parts:
    whole = _read_stored_split(stored, part.split, resize, skip_damaged)
    inside = (whole.indices >= part.start) & (whole.indices < part.stop)
    num_skipped += len(part) - int(inside.sum())
    if inside.all():
      found.append(Split(whole.images, whole.labels))
    else:
      found.append(Split(whole.images[inside], whole.labels[inside]))
  if not any(map(len, found)):
    raise errors.UserError(
      f"{stored.source}: none of the {sum(map(len, parts))} images can be read;"
      " get the files again"
    )
  if len(found) == 1:
    return found[0], num_skipped
  return Split(
    np.concatenate([x.images for x in found]),
    np.concatenate([x.labels for x in found]),
  ), num_skipped


@dataclasses.dataclass(frozen=True)
class _Arrays:
  """The readable examples of a stored split, and their indices in it."""

  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray

  def is_valid(self, shape, num_classes, count, complete):
    n = len(self.labels)
    return (
      (self.images.shape, self.images.dtype) == ((n, *shape), np.uint8)
      and (self.labels.shape, self.labels.dtype) == ((n,), np.int32)
      and self.indices.shape == (n,)
      and (n == count if complete else n <= count)
      and bool(((self.labels >= 0) & (self.labels < num_classes)).all())
    )


def _read_stored_split(stored, split, resize, skip_damaged) -> _Arrays:
  """Load a stored split from the cache, or decode it."""
  examples, num_classes = stored.examples[split], len(stored.class_names)
  variant = f"{split}{resize.key}{'-skip' * skip_damaged}"
  path = stored.cache_folder() / f"{variant}.npz"
  arrays = array_cache.load(path)
  if arrays is not None and {"images", "labels", "indices"} <= arrays.keys():
    cached = _Arrays(arrays["images"], arrays["labels"], arrays["indices"])
    if cached.is_valid(
      stored.shape, num_classes, len(examples), not skip_damaged
    ):
      return cached
  _log.info(
    "reading %s %s: %s images", stored.name, split, f"{len(examples):,}"
  )
  result = _decode_all(examples, resize, stored, split, skip_damaged)
  array_cache.save(path, dataclasses.asdict(result))
  return result


def _decode_all(examples, resize, stored, split, skip_damaged):
  count, shape = len(examples), stored.shape
  images = np.empty((count, *shape), np.uint8)
  labels = np.empty(count, np.int32)
  damaged = np.zeros(count, bool)

  def decode(numbered):
    index, (content, label) = numbered
    try:
      images[index], labels[index] = streamed.decode_example(
        content, label, resize, shape, len(stored.class_names)
      )
    except streamed.UnlabelledError as e:
      return index, e
    except Exception as e:  # Damaged files raise many types.
      return index, e
    return None

  start = line = time.monotonic()
  threads = min(os.cpu_count() or 1, _MAX_THREADS)
  numbered, done = enumerate(iter(examples)), 0
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    while done < count:
      try:
        chunk = list(itertools.islice(numbered, _CHUNK))
        if not chunk:
          raise ValueError(f"{done} examples instead of {count}")
        if chunk[-1][0] >= count:
          raise ValueError(f"more than {count} examples")
      except Exception as e:  # Damaged files raise many types.
        raise errors.UserError(
          f"{stored.source}: damaged, cannot read {split}"
          f" ({errors.brief(e)}); remove this folder to prepare the dataset"
          " again"
        ) from e
      for index, error in filter(None, pool.map(decode, chunk)):
        where = examples.where(index)
        if isinstance(error, streamed.UnlabelledError):
          raise streamed.UnlabelledError(f"{where}: {error}") from error
        reason = f"{where}: cannot be read ({errors.brief(error)})"
        if not skip_damaged:
          raise errors.UserError(
            f"{reason}; remove or replace it, or set data.skip_damaged"
          ) from error
        _log.warning("%s; skipped", reason)
        damaged[index] = True
      done += len(chunk)
      if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
        line = time.monotonic()
        left = (line - start) / done * (count - done)
        _log.info(
          "read %s of %s images  ETA %s",
          f"{done:,}",
          f"{count:,}",
          terminal.duration(left),
        )
  if next(numbered, None) is not None:
    raise errors.UserError(
      f"{stored.source}: damaged, {split} has more than {count} examples;"
      " remove this folder to prepare the dataset again"
    )
  indices = np.flatnonzero(~damaged)
  if damaged.any():
    images, labels = images[indices], labels[indices]
  return _Arrays(images, labels, indices)
