"""Dropout (Srivastava et al. 2014) with masks that cost little.

Stochastic depth (Huang et al. 2016) is dropout of a branch's whole output.

A mask element needs 16 random bits, and a Threefry block gives 64: flax's
Dropout, through jax.random, makes a block for each element, and on a CPU in a
loop over whole arrays. The blocks here are those of jax.random, written out so
that the compiler fuses them into what uses the mask.
"""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LEVELS = 2**16


class Dropout(nn.Module):
  """Sets a share of the elements to 0 and scales the others up.

  Attributes:
    rate: the share, in [0, 1); rounded to a multiple of 2^-16.
    whole: whether an image is set to 0 as a whole or not at all.
  """

  rate: float
  whole: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns x [B, ..., D], with dropout in training (rng `dropout`)."""
    kept = max(1, _LEVELS - round(self.rate * _LEVELS))
    if not train or kept == _LEVELS:
      return x
    shape = (len(x), *[1] * (x.ndim - 1)) if self.whole else x.shape
    mask = random_mask(self.make_rng("dropout"), shape, kept)
    return jnp.where(mask, x * (_LEVELS / kept), 0).astype(x.dtype)


def random_mask(key: jax.Array, shape: tuple[int, ...], kept: int) -> jax.Array:
  """Draws a mask; an element is a function of the key and its place alone.

  Args:
    key: a PRNG key.
    shape: of the mask, [..., D]; up to 2^32 rows.
    kept: an element is True with probability kept / 2^16.

  Returns:
    bool of that shape: its 4 parts along the last axis are made of the 4
    quarters of the Threefry-2x32 blocks with the counters (row, column in the
    part).
  """
  *rows, features = shape
  part = (*rows, -(-features // 4))
  row = jnp.zeros(part, jnp.uint32)
  for axis in range(len(rows)):
    stride = np.uint32(math.prod(rows[axis + 1 :]))
    row += stride * jax.lax.broadcasted_iota(jnp.uint32, part, axis)
  column = jax.lax.broadcasted_iota(jnp.uint32, part, len(rows))
  key0, key1 = jax.random.bits(key, (2,), jnp.uint32)
  x, y = threefry2x32(key0, key1, row, column)
  low = np.uint32(_LEVELS - 1)
  quarters = [part < kept for part in (x & low, x >> 16, y & low, y >> 16)]
  return jnp.concatenate(quarters, axis=-1)[..., :features]


def threefry2x32(
  key0: jax.Array, key1: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32, 20 rounds (Salmon et al. 2011): uint32 to uint32."""
  keys = (key0, key1, key0 ^ key1 ^ _PARITY)
  x, y = x + keys[0], y + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x = x + y
      y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
    x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
