"""From a split, wherever its images are, to batches on the devices."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
import os

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from rescalevit_jax.data import dataset
from rescalevit_jax.data import records
from rescalevit_jax.distributed import sharding

_READ_AHEAD_BYTES = 2**30
_MAX_THREADS = 16

# From the number of a batch to its examples' places in the split, int32
# [..., B]; the last axis is split over the devices.
Plan = Callable[[int], np.ndarray]


class Loader:
  """Batches of one split.

  Those of a split in memory are taken from the devices, which hold it as a
  whole. Those of a streamed one are read by threads, ahead of time, and by each
  process for its own devices only. Both give the same batches.

  Args:
    split: the images.
    mesh: the devices.
  """

  def __init__(self, split: dataset.Split | records.StreamedSplit, mesh: Mesh):
    self._split = split
    self._mesh = mesh
    if isinstance(split, dataset.Split):
      everywhere = sharding.replicated(mesh)
      self._arrays = sharding.put((split.images, split.labels), everywhere)

  def __len__(self) -> int:
    return len(self._split)

  @contextlib.contextmanager
  def batches(
    self, plan: Plan, numbers: range
  ) -> Iterator[Iterator[tuple[jax.Array, jax.Array]]]:
    """Opens an iterator of batches; it begins at any of them at once.

    Args:
      plan: of the batches.
      numbers: the batches wanted.

    Yields:
      The iterator of images, [..., B, H, W, 3] uint8, and labels, [..., B]
      int32.
    """
    if isinstance(self._split, dataset.Split):
      yield map(self._take, map(plan, numbers))
      return
    import grain  # Not needed otherwise.

    place = self._place(plan(numbers.start).ndim)

    def read(number):
      indices = plan(number)
      own = sharding.local_shard(indices, place)
      images, labels = self._split.read(own.ravel())
      images = images.reshape(*own.shape, *images.shape[1:])
      return images, labels.reshape(own.shape), indices.shape

    def put(found):
      images, labels, shape = found
      make = functools.partial(jax.make_array_from_process_local_data, place)
      return make(images, (*shape, *images.shape[-3:])), make(labels, shape)

    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    own = sharding.local_shard(plan(numbers.start), place)
    batch_bytes = own.size * math.prod(self._split.shape)
    ahead = min(2 * threads, max(2, _READ_AHEAD_BYTES // batch_bytes))
    options = grain.ReadOptions(threads, ahead)
    numbers = grain.MapDataset.range(numbers.start, numbers.stop)
    found = iter(numbers.map(read).to_iter_dataset(options))
    try:
      yield map(put, found)
    finally:
      found.close()

  def _take(self, indices):
    place = self._place(indices.ndim)
    return _taking(place)(*self._arrays, sharding.put(indices, place))

  def _place(self, axes: int) -> NamedSharding:
    return sharding.split(self._mesh, axis=axes - 1)


@functools.cache
def _taking(place):
  def take(images, labels, indices):
    return images[indices], labels[indices]

  return jax.jit(take, out_shardings=place)
