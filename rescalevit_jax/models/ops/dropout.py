"""Dropout (Srivastava et al. 2014) with masks of a bit an element.

Stochastic depth (Huang et al. 2016) is dropout of a branch's whole output.

All masks of a step come from one key: a Threefry-2x32 block has the counter
(row, site and column), and its 64 bits decide on four elements. The masks are
kept for the backward pass as packed words; jax.random would make a block and a
byte for each element, and derive a key for each site.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LEVELS = 2**16
_BLOCKS = 8  # Of four bits each, in a word.
_MAX_COLUMNS = 2**20  # Blocks of a row; the counter's other bits are the site.


def drop(
  x: jax.Array,
  key: jax.Array | None,
  site: int,
  rate: float,
  whole: bool = False,
) -> jax.Array:
  """Return x [B, ..., D] with a share of it set to 0, the rest scaled up.

  Args:
    x: the input.
    key: uint32 [2], the step's key; see `step_key`. None: x stays as it is.
    site: number of this dropout in the model, below 2^12.
    rate: the share, in [0, 1); rounded to a multiple of 2^-16.
    whole: whether an image is set to 0 as a whole or not at all.
  """
  kept = max(1, _LEVELS - round(rate * _LEVELS))
  if key is None or kept == _LEVELS:
    return x
  shape = (len(x), *[1] * (x.ndim - 1)) if whole else x.shape
  mask = unpack(packed_mask(key, site, shape, kept), shape[-1])
  return jnp.where(mask, x * (_LEVELS / kept), 0).astype(x.dtype)


def step_key(key: jax.Array) -> jax.Array:
  """Return the key of all masks of a step, uint32 [2], from a PRNG key."""
  return jax.random.bits(key, (2,), jnp.uint32)


def packed_mask(
  key: jax.Array, site: int, shape: tuple[int, ...], kept: int
) -> jax.Array:
  """Return a random mask as words; a bit depends on its place and key alone.

  Args:
    key: uint32 [2].
    site: number of the mask among those of this key.
    shape: of the mask, [..., D]; up to 2^32 rows.
    kept: a bit is 1 with probability kept / 2^16.

  Returns:
    uint32 [..., W], W = ceil(D / 32): bit k of word w is element k W + w.
  """
  *rows, features = shape
  words = -(-features // (4 * _BLOCKS))
  assert words * _BLOCKS <= _MAX_COLUMNS
  counters = (*rows, words, _BLOCKS)
  row = jnp.zeros(counters, jnp.uint32)
  for axis in range(len(rows)):
    stride = np.uint32(math.prod(rows[axis + 1 :]))
    row += stride * jax.lax.broadcasted_iota(jnp.uint32, counters, axis)
  word, block = (
    jax.lax.broadcasted_iota(jnp.uint32, counters, len(rows) + i)
    for i in range(2)
  )
  column = np.uint32(site * _MAX_COLUMNS) + word * np.uint32(_BLOCKS) + block
  x, y = threefry2x32(key[0], key[1], row, column)
  low = np.uint32(_LEVELS - 1)
  bits = jnp.zeros(counters, jnp.uint32)
  for i, drawn in enumerate((x & low, x >> 16, y & low, y >> 16)):
    bits |= (drawn < kept).astype(jnp.uint32) << (4 * block + np.uint32(i))
  return bits.sum(-1, dtype=jnp.uint32)  # Each bit is in one block alone.


def unpack(words: jax.Array, features: int) -> jax.Array:
  """Return the mask, bool [..., D], of words [..., W]; see `packed_mask`."""
  bit = jnp.arange(4 * _BLOCKS, dtype=jnp.uint32)[:, None]
  bits = (words[..., None, :] >> bit) & np.uint32(1)
  return bits.reshape(*words.shape[:-1], -1)[..., :features] > 0


def threefry2x32(
  key0: jax.Array, key1: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return Threefry-2x32 of 20 rounds (Salmon et al. 2011), all uint32."""
  keys = (key0, key1, key0 ^ key1 ^ _PARITY)
  x, y = x + keys[0], y + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x = x + y
      y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
    x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
