"""Load image datasets, and compute the indices of a batch."""

import dataclasses
import functools
import logging
import math
from typing import Any

from jaxtyping import Int32
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import folder
from rescalevit_jax.data import image_files
from rescalevit_jax.data import index_shuffle
from rescalevit_jax.data import resident
from rescalevit_jax.data import splits
from rescalevit_jax.data import stored as stored_lib
from rescalevit_jax.data import streamed
from rescalevit_jax.data import tfds_builders

_log = logging.getLogger(__name__)


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
    num_skipped: number of damaged images left out of the test split; with
      `num_val`, of the training split.
  """

  name: str
  train: resident.Split | streamed.StreamedSplit
  test: resident.Split | streamed.StreamedSplit
  num_classes: int
  class_names: tuple[str, ...]
  test_split: str
  num_skipped: int


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

  The name is "cifar10", "cifar100", "digits", another tfds dataset of images
  with one label each, or "folder:PATH" for a folder of image files. `data_dir`
  is the folder of prepared datasets; None for the default of tfds. The other
  arguments are the config keys `data.*`, see docs/configuration.md.

  Images and their order are the same for both formats of prepared files
  (array_record, tfrecord) and for all values of `source`.

  Raises:
    UserError: the dataset is unknown, not suitable, cannot be prepared or is
      damaged, or `num_val` leaves no training images.
  """
  first_resize = image_files.Resize(image_size, resize, crop_ratio)
  stored = stored_lib.open_dataset(name, data_dir, first_resize)
  train_parts = splits.resolve(
    train_split, stored.sizes, "data.train_split", name
  )
  tests = {} if num_val else _candidates(stored, test_split, name)
  parts = sum(tests.values(), train_parts)
  read = _reader(stored, parts, source, max_gb, first_resize, skip_damaged)
  train, num_skipped = read(train_parts)
  if num_skipped:
    _log.warning("left out %d damaged training images", num_skipped)
  if num_val:
    train, test = _split_validation(train, num_val, name)
    chosen = f"{train_split} ({num_val} held out)"
  else:
    test, chosen, num_skipped = _first_labeled(tests, read, name)
  names = stored.class_names
  return Dataset(name, train, test, len(names), names, chosen, num_skipped)


def load_test(
  name: str,
  data_dir: str | None,
  *,
  test_split: str | None = None,
  source: str = "auto",
  max_gb: float = 4.0,
  image_size: int | None = None,
  resize: str = "squash",
  crop_ratio: float = 0.875,
  skip_damaged: bool = False,
  split_key: str = "data.test_split",
  **others: Any,
) -> tuple[resident.Split | streamed.StreamedSplit, str, tuple[str, ...], int]:
  """Load only the test split of a dataset.

  The arguments are those of `load`; `others` have no effect. `split_key` is the
  config key of `test_split`, for errors.

  Returns:
    The split, its name, the class names, and the number of damaged images that
    were left out.
  """
  del others
  first_resize = image_files.Resize(image_size, resize, crop_ratio)
  stored = stored_lib.open_dataset(name, data_dir, first_resize)
  tests = _candidates(stored, test_split, name, split_key)
  parts: list[splits.Part] = sum(tests.values(), [])
  read = _reader(stored, parts, source, max_gb, first_resize, skip_damaged)
  test, chosen, num_skipped = _first_labeled(tests, read, name)
  return test, chosen, stored.class_names, num_skipped


def expand(name: str, data_dir: str | None) -> list[str]:
  """Expand NAME/* to the datasets of all configs of NAME."""
  if not name.endswith("/*"):
    return [name]
  if name.startswith(folder.PREFIX):
    raise errors.UserError(
      f"config: eval_dataset ({name}): a folder has no configs; leave out /*"
    )
  base = name.removesuffix("/*")
  configs = tfds_builders.config_names(base, data_dir)
  if not configs:
    raise errors.UserError(
      f"config: eval_dataset ({name}): {base} has no configs; leave out /*"
    )
  return [f"{base}/{config}" for config in configs]


def _reader(stored, parts, source, max_gb, resize, skip_damaged):
  """Return a function that reads parts of splits, resident or streamed."""
  if source == "auto":
    images = sum(stored.sizes[split] for split in {x.split for x in parts})
    fits = images * math.prod(stored.shape) <= max_gb * 1e9
    source = "resident" if fits else "streaming"
  if source == "streaming" and skip_damaged:
    raise errors.UserError(
      "config: data.skip_damaged (True) needs all images in memory, but they"
      " are streamed; set data.source=resident, or remove damaged images"
    )
  if source == "streaming":
    return functools.partial(_streamed, stored, resize=resize)
  return functools.partial(
    resident.read_split, stored, resize=resize, skip_damaged=skip_damaged
  )


def _first_labeled(tests, read, name):
  """Read the first split that has labels; return its name, too."""
  *_, last = tests
  for split, parts in tests.items():
    try:
      test, num_skipped = read(parts)
      break
    except streamed.UnlabeledError:
      if split == last:
        raise
      _log.warning(
        "%s: the split %s has no labels; evaluating on the next one",
        name,
        split,
      )
  if num_skipped:
    _log.warning("left out %d damaged test images", num_skipped)
  return test, split, num_skipped


def batch_indices(
  seed: int, step: int, batch: int, num_examples: int
) -> Int32[np.ndarray, " batch"]:
  """Return the indices of the examples in a batch, a pure function.

  The batches of steps 1, 2, ... are consecutive parts of an endless sequence of
  epochs. Each epoch has every example once, in a new random order. The seed is
  at least 0, and a batch may be larger than an epoch.
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
  return tuple(train.subset(np.flatnonzero(x)) for x in (~is_val, is_val))


def _candidates(stored, test_split, name, key="data.test_split"):
  """Return the parts of the candidate test splits, in order of preference."""
  usual = ["test", "validation"] if test_split is None else [test_split]
  found = [x for x in usual if test_split or x in stored.sizes]
  if not found:
    advice = f"choose one by {key}"
    if key == "data.test_split":
      advice += ", or hold out training images by data.num_val"
    raise errors.UserError(
      f"dataset: {name} has no split test or validation; its splits are"
      f" {', '.join(stored.sizes) or '(none)'}; {advice}"
    )
  return {x: splits.resolve(x, stored.sizes, key, name) for x in found}


def _streamed(stored, parts, resize):
  """Return a split that stays on disk, and 0 skipped images."""
  chosen = [(stored.examples[part.split], part.indices) for part in parts]
  for examples, _ in chosen:
    if hasattr(examples, "check_random_access"):
      examples.check_random_access()
  split = streamed.StreamedSplit(
    chosen, stored.shape, resize, len(stored.class_names)
  )
  split.read([0])  # Finds a split without labels before the run starts.
  return split, 0
