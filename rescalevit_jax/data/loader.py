"""Load batches of a split, in memory or on disk, onto the devices."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
import os

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jaxtyping import Array, Int32, UInt8
import numpy as np

from rescalevit_jax.data import resident
from rescalevit_jax.data import streamed
from rescalevit_jax.distributed import sharding

_READ_AHEAD_BYTES = 2**30
_MAX_THREADS = 16

# Returns the indices of a batch's examples by the batch's number. The last axis
# is sharded over the devices.
BatchIndices = Callable[[int], Int32[np.ndarray, "... B"]]


class Loader:
  """Batches of one split.

  A split in memory is copied to all devices, and batches are gathered there. A
  streamed split is read ahead by threads, and each process reads only the
  examples of its own devices. Both give the same batches.
  """

  def __init__(
    self, split: resident.Split | streamed.StreamedSplit, mesh: Mesh
  ):
    self._split = split
    self._mesh = mesh
    if isinstance(split, resident.Split):
      everywhere = sharding.replicated(mesh)
      self._arrays = sharding.put((split.images, split.labels), everywhere)

  def __len__(self) -> int:
    return len(self._split)

  @contextlib.contextmanager
  def batches(
    self, batch_indices: BatchIndices, numbers: range
  ) -> Iterator[
    Iterator[tuple[UInt8[Array, "... B H W 3"], Int32[Array, "... B"]]]
  ]:
    """Open an iterator of batches of images and labels.

    The start-up time does not depend on the first number.
    """
    if isinstance(self._split, resident.Split):
      yield map(self._gather, map(batch_indices, numbers))
      return
    import grain  # Not needed for splits in memory.

    first = batch_indices(numbers.start)
    batch_sharding = self._sharding(first.ndim)

    def read(number):
      own = sharding.local_shard(batch_indices(number), batch_sharding)
      images, labels = self._split.read(own.ravel())
      images = images.reshape(*own.shape, *images.shape[1:])
      return images, labels.reshape(own.shape)

    put = functools.partial(
      jax.make_array_from_process_local_data, batch_sharding
    )
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    own = sharding.local_shard(first, batch_sharding)
    batch_bytes = own.size * math.prod(self._split.shape)
    ahead = min(2 * threads, max(2, _READ_AHEAD_BYTES // batch_bytes))
    options = grain.ReadOptions(threads, ahead)
    source = grain.MapDataset.range(numbers.start, numbers.stop)
    local_batches = iter(source.map(read).to_iter_dataset(options))
    try:
      yield map(put, local_batches)
    finally:
      local_batches.close()

  def _gather(self, indices):
    batch_sharding = self._sharding(indices.ndim)
    gather = _compiled_gather(batch_sharding)
    return gather(*self._arrays, sharding.put(indices, batch_sharding))

  def _sharding(self, axes: int) -> NamedSharding:
    return sharding.split(self._mesh, axis=axes - 1)


@functools.cache
def _compiled_gather(batch_sharding):
  def take(images, labels, indices):
    return images[indices], labels[indices]

  return jax.jit(take, out_shardings=batch_sharding)
