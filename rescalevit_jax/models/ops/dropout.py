"""Dropout (Srivastava et al. 2014) with fast random masks.

Stochastic depth (Huang et al. 2016) is dropout of a branch's whole output.

One key generates all masks of a step. The counter of a Threefry-2x32 block is
(image, token, mask, column), and its 64 bits decide four elements. jax.random
would compute a block per element and a key per mask. On a GPU the backward pass
reads the masks as bits packed into words, not as one byte per element.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.runtime import accelerator

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LEVELS = 2**16
_BLOCKS = 8  # Of four bits each, in a word.
# A block's two counters hold image and token, and site and column.
_MAX_TOKENS = 2**14
_MAX_COLUMNS = 2**20


def drop(
  x: Float[Array, "B ... D"],
  key: UInt32[Array, " 2"] | None,
  index: int,
  rate: float,
  whole: bool = False,
) -> Float[Array, "B ... D"]:
  """Return x with a fraction of its elements set to 0 and the rest scaled up.

  Without a key of the step, return x. `index` is the number of this dropout in
  the model, below 2^12. The rate in [0, 1) is rounded to a multiple of 2^-16.
  If `whole`, drop whole images instead of elements.
  """
  kept = max(1, _LEVELS - round(rate * _LEVELS))
  if key is None or kept == _LEVELS:
    return x
  shape = (len(x), *[1] * (x.ndim - 1)) if whole else x.shape
  mask = random_mask(key, index, shape, kept)
  return jnp.where(mask, x * (_LEVELS / kept), 0).astype(x.dtype)


def step_key(key: Key[Array, ""]) -> UInt32[Array, " 2"]:
  """Return the key of all masks of a step, from a PRNG key."""
  return jax.random.bits(key, (2,), jnp.uint32)


def random_mask(
  key: UInt32[Array, " 2"], index: int, shape: tuple[int, ...], kept: int
) -> Bool[Array, "..."]:
  """Return a random mask; each element depends only on its index and the key.

  The last axis of the mask is split into four parts. Part i uses 16-bit word i
  of each random block. The block's counters are image and token, and mask and
  column in the part. An element is True with probability kept / 2^16. The shape
  is [B, ..., D], with up to 2^18 images of 2^14 tokens.
  """
  *rows, features = shape
  words = -(-features // (4 * _BLOCKS))
  if math.prod(rows[1:]) > _MAX_TOKENS:
    raise errors.UserError(
      f"model.dropout_rate: {math.prod(rows[1:])} tokens are more than dropout"
      f" supports ({_MAX_TOKENS}); set it to 0, or choose larger patches"
    )
  assert words * _BLOCKS <= _MAX_COLUMNS
  if accelerator.platform() == "cpu":
    # On a CPU, computing the mask at each use is faster than unpacking it.
    parts = _quarters(key, index, rows, (_BLOCKS * words,), kept)
    return jnp.concatenate(parts, axis=-1)[..., :features]
  # Packed: bit 8 i + j of word w is element 8 i W + j W + w, for W words. The
  # bits of a block have the same j. XLA does not recompute a sum for each use.
  block = jnp.arange(_BLOCKS, dtype=jnp.uint32)[:, None]
  packed = sum(
    part.astype(jnp.uint32) << (block + np.uint32(_BLOCKS * i))
    for i, part in enumerate(
      _quarters(key, index, rows, (_BLOCKS, words), kept)
    )
  ).sum(-2, dtype=jnp.uint32)
  bit = jnp.arange(4 * _BLOCKS, dtype=jnp.uint32)[:, None]
  mask = (packed[..., None, :] >> bit) & np.uint32(1)
  return mask.reshape(*rows, -1)[..., :features] > 0


def _quarters(key, index, rows, columns, kept):
  """Return four parts of a mask, bool [*rows, *columns] each."""
  shape = (*rows, *columns)
  # The mask of a token does not depend on the number of tokens.
  strides = [_MAX_TOKENS, *_strides(rows[1:]), *_strides(columns)]
  numbers = [
    np.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for axis, stride in enumerate(strides)
  ]
  first = np.uint32(index * _MAX_COLUMNS)
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
  key0: UInt32[Array, ""],
  key1: UInt32[Array, ""],
  x: UInt32[Array, "..."],
  y: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
  """Return Threefry-2x32 with 20 rounds (Salmon et al. 2011)."""
  keys = (key0, key1, key0 ^ key1 ^ _PARITY)
  x, y = x + keys[0], y + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x = x + y
      y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
    x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
