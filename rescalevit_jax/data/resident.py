"""Splits in memory: read from disk, decoded in parallel and cached."""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import itertools
import logging
import os
import time

from jaxtyping import Int32, UInt8
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import array_cache
from rescalevit_jax.data import image_files
from rescalevit_jax.data import splits
from rescalevit_jax.data import stored as stored_lib
from rescalevit_jax.data import streamed
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


def read_split(
  stored: stored_lib.StoredDataset,
  parts: Sequence[splits.Part],
  resize: image_files.Resize,
  skip_damaged: bool,
) -> tuple[Split, int]:
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
        advice = (
          "remove this folder to prepare the dataset again"
          if stored.files is None
          else "repair the file or remove it"
        )
        raise errors.UserError(
          f"{stored.source}: damaged, cannot read {split}"
          f" ({errors.brief(e)}); {advice}"
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
