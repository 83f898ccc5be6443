"""Dropout (Srivastava et al. 2014) with masks that cost little.

Stochastic depth (Huang et al. 2016) is dropout of a branch's whole output.

All masks of a step come from one key: a Threefry-2x32 block has the counter
(image, token, site, column), and its 64 bits decide on four elements.
jax.random would make a block for each element and derive a key for each site.
On a GPU the masks are kept for the backward pass as packed words, not as a byte
an element.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.runtime import accelerator

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LEVELS = 2**16
_BLOCKS = 8  # Of four bits each, in a word.
# A block's two counters hold image and token, and site and column.
_MAX_TOKENS = 2**14
_MAX_COLUMNS = 2**20


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
  mask = random_mask(key, site, shape, kept)
  return jnp.where(mask, x * (_LEVELS / kept), 0).astype(x.dtype)


def step_key(key: jax.Array) -> jax.Array:
  """Return the key of all masks of a step, uint32 [2], from a PRNG key."""
  return jax.random.bits(key, (2,), jnp.uint32)


def random_mask(
  key: jax.Array, site: int, shape: tuple[int, ...], kept: int
) -> jax.Array:
  """Return a random mask; an element depends on its place and the key alone.

  Args:
    key: uint32 [2].
    site: number of the mask among those of this key.
    shape: of the mask, [B, ..., D]: up to 2^18 images of 2^14 tokens.
    kept: an element is True with probability kept / 2^16.

  Returns:
    bool of that shape: its 4 parts along the last axis are made of the 4
    quarters of the blocks with the counters (image and token, site and column
    in the part).
  """
  *rows, features = shape
  words = -(-features // (4 * _BLOCKS))
  assert math.prod(rows[1:]) <= _MAX_TOKENS
  assert words * _BLOCKS <= _MAX_COLUMNS
  if accelerator.platform() == "cpu":
    # The compiler makes the mask where it is used: faster than to unpack it.
    parts = _quarters(key, site, rows, (_BLOCKS * words,), kept)
    return jnp.concatenate(parts, axis=-1)[..., :features]
  # Packed: bit 8 i + j of word w is element 8 i W + j W + w, for W words. A
  # block has bits of one j alone. XLA does not make a sum anew for each use.
  block = jnp.arange(_BLOCKS, dtype=jnp.uint32)[:, None]
  packed = sum(
    part.astype(jnp.uint32) << (block + np.uint32(_BLOCKS * i))
    for i, part in enumerate(_quarters(key, site, rows, (_BLOCKS, words), kept))
  ).sum(-2, dtype=jnp.uint32)
  bit = jnp.arange(4 * _BLOCKS, dtype=jnp.uint32)[:, None]
  mask = (packed[..., None, :] >> bit) & np.uint32(1)
  return mask.reshape(*rows, -1)[..., :features] > 0


def _quarters(key, site, rows, columns, kept):
  """Return four parts of a mask, bool [*rows, *columns] each."""
  shape = (*rows, *columns)
  # A token's masks are the same whether the others are computed or not.
  strides = [_MAX_TOKENS, *_strides(rows[1:]), *_strides(columns)]
  numbers = [
    np.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for axis, stride in enumerate(strides)
  ]
  first = np.uint32(site * _MAX_COLUMNS)
  x, y = threefry2x32(
    key[0],
    key[1],
    sum(numbers[: len(rows)]),
    sum(numbers[len(rows) :], start=first),
  )
  low = np.uint32(_LEVELS - 1)
  return [half < kept for half in (x & low, x >> 16, y & low, y >> 16)]


def _strides(shape):
  """Return the strides of an array of this shape in elements."""
  return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


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
