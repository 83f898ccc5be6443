"""The device mesh and the shardings on it.

Data parallel: one axis, `data`, over all devices; batches are sharded along it.
All other arrays are replicated, except large parameters and momenta with
`sharding.fsdp`.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from rescalevit_jax import errors

_MIN_SPLIT = 2**14  # Elements; smaller arrays are replicated.


def create_mesh() -> Mesh:
  """Return a mesh of all devices of all processes."""
  return Mesh(np.asarray(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding that replicates an array."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Return the sharding that splits an array along an axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def create(tree: Any, mesh: Mesh, fsdp: bool) -> Any:
  """Return the shardings of a tree of arrays or shapes.

  With `fsdp`, large arrays are split along the longest axis that the number of
  devices divides.
  """

  def create_sharding(x):
    divisible = [n if n % mesh.size == 0 else 0 for n in x.shape]
    if not fsdp or math.prod(x.shape) < _MIN_SPLIT or not any(divisible):
      return replicated(mesh)
    return split(mesh, divisible.index(max(divisible)))

  return jax.tree.map(create_sharding, tree)


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Put arrays on the devices; every process passes the full arrays."""

  def put_array(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(put_array, tree)


def local_shard(x: np.ndarray, sharding: NamedSharding) -> np.ndarray:
  """Return the part of an array that belongs to the devices of this process.

  The sharding splits at most one axis, in the order of the processes.
  """
  indices = sharding.addressable_devices_indices_map(x.shape).values()
  parts = [index for index in indices if index is not None]
  own = []
  for axis, size in enumerate(x.shape):
    bounds = [part[axis].indices(size) for part in parts]
    own.append(slice(min(b[0] for b in bounds), max(b[1] for b in bounds)))
  return x[tuple(own)]


def check_batch(batch: int, accum_steps: int, mesh: Mesh) -> None:
  """Raise UserError if a micro-batch cannot be split over the devices."""
  if batch // accum_steps % mesh.size:
    parts = f"{mesh.size} devices"
    if accum_steps > 1:
      parts = f"accum_steps ({accum_steps}) times {parts}"
    raise errors.UserError(
      f"config: batch is {batch}, not divisible by {parts}; choose a multiple"
    )
