"""Kernels in a parameter tree, and their shapes as matrices."""

import math

import jax
from jax.tree_util import KeyPath


def is_kernel(path: KeyPath) -> bool:
  """Return whether a parameter is the kernel of a linear layer."""
  return path[-1].key == "kernel"


def is_block_kernel(path: KeyPath) -> bool:
  """Return whether a parameter is the kernel of a linear layer of a block."""
  return path[0].key == "Transformer" and is_kernel(path)


def num_input_axes(path: KeyPath, kernel: jax.Array) -> int:
  """Return the number of leading axes of a kernel that are inputs.

  Query, key and value have [D, h, D/h], all other kernels [..., outputs].
  """
  to_heads = path[-2].key in ("query", "key", "value")
  return 1 if to_heads else kernel.ndim - 1


def matrix_shape(path: KeyPath, kernel: jax.Array) -> tuple[int, int]:
  """Return a kernel's numbers of inputs and outputs, over all axes."""
  inputs = math.prod(kernel.shape[: num_input_axes(path, kernel)])
  return inputs, kernel.size // inputs
