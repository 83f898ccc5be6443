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
  """Images and labels in memory."""

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
  found = []
  for part in parts:
    arrays = _read_stored_split(stored, part.split, resize, skip_damaged)
    whole = Split(arrays["images"], arrays["labels"])
    inside = arrays["indices"] >= part.indices.start
    inside &= arrays["indices"] < part.indices.stop
    found.append(whole if inside.all() else whole.subset(inside))
  total = sum(len(part.indices) for part in parts)
  num_read = sum(map(len, found))
  if not num_read:
    raise errors.UserError(
      f"{stored.source}: none of the {total} images can be read; get the files"
      " again"
    )
  split = found[0]
  if len(found) > 1:
    split = Split(
      np.concatenate([x.images for x in found]),
      np.concatenate([x.labels for x in found]),
    )
  return split, total - num_read


def _read_stored_split(stored, split, resize, skip_damaged):
  """Load a stored split from the cache, or decode it.

  Returns:
    The readable images, their labels and their indices in the split, by name.
  """
  count = stored.sizes[split]
  variant = f"{split}{resize.key}{'-skip' * skip_damaged}"
  path = stored.cache_folder() / f"{variant}.npz"
  cached = array_cache.load(path)
  if cached is not None and _is_valid(cached, stored, count, skip_damaged):
    return cached
  _log.info("reading %s %s: %s images", stored.name, split, f"{count:,}")
  arrays = _decode_all(stored, split, resize, skip_damaged)
  array_cache.save(path, arrays)
  return arrays


def _is_valid(arrays, stored, count, skip_damaged):
  """Return whether cached arrays are those of a stored split."""
  if not {"images", "labels", "indices"} <= arrays.keys():
    return False
  images, labels = arrays["images"], arrays["labels"]
  n = len(labels)
  return (
    (images.shape, images.dtype) == ((n, *stored.shape), np.uint8)
    and (labels.shape, labels.dtype) == ((n,), np.int32)
    and arrays["indices"].shape == (n,)
    and (n <= count if skip_damaged else n == count)
    and bool(((labels >= 0) & (labels < len(stored.class_names))).all())
  )


def _decode_all(stored, split, resize, skip_damaged):
  examples, shape = stored.examples[split], stored.shape
  count = len(examples)
  images = np.empty((count, *shape), np.uint8)
  labels = np.empty(count, np.int32)
  damaged = np.zeros(count, bool)

  def decode(numbered):
    index, example = numbered
    try:
      content, label = example or examples[index]
      images[index], labels[index] = streamed.decode_example(
        content, label, resize, shape, len(stored.class_names)
      )
    except Exception as e:  # Damaged files raise many types.
      return index, e
    return None

  start = line = time.monotonic()
  threads = min(os.cpu_count() or 1, _MAX_THREADS)
  done = 0
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for chunk in _chunks(stored, split):
      for index, error in filter(None, pool.map(decode, chunk)):
        where = examples.where(index)
        intact = streamed.UnlabeledError, streamed.ShapeError
        if isinstance(error, intact) or not skip_damaged:
          raise streamed.error_at(where, error) from error
        _log.warning(
          "%s: cannot be read (%s); skipped", where, errors.brief(error)
        )
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
  indices = np.flatnonzero(~damaged)
  if damaged.any():
    images, labels = images[indices], labels[indices]
  return {"images": images, "labels": labels, "indices": indices}


def _chunks(stored, split):
  """Yield lists of indices with their examples, or None to read them later.

  Raises:
    UserError: the files are damaged, or hold another number of examples.
  """
  examples = stored.examples[split]
  count, done = len(examples), 0
  if stored.files is None:
    numbered = enumerate(examples)
  else:  # An unreadable file counts as damaged.
    numbered = zip(range(count), itertools.repeat(None))
  try:
    while chunk := list(itertools.islice(numbered, _CHUNK)):
      done += len(chunk)
      if done > count:
        raise ValueError(f"more than {count} examples")
      yield chunk
    if done < count:
      raise ValueError(f"{done} examples instead of {count}")
  except Exception as e:  # Damaged files raise many types.
    advice = (
      "remove this folder to prepare the dataset again"
      if stored.files is None
      else "repair the file or remove it"
    )
    raise errors.UserError(
      f"{stored.source}: damaged, cannot read {split} ({errors.brief(e)});"
      f" {advice}"
    ) from e
