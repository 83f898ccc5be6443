"""TrivialAugment (Müller & Hutter 2021, arXiv:2103.10158), on the device.

Each image gets one operation of uniform strength, drawn uniformly from the
paper's "wide" search space. Operations equal Pillow's, which the paper uses,
without rounding and with bilinear interpolation.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, Int, Key, UInt8

_STRENGTHS = 31
# The wide search space: values at strength 1.
_SHEAR = 0.99
_SHIFT = 32.0  # Pixels.
_ANGLE = math.radians(135)
_ENHANCEMENT = 0.99
_POSTERIZE_BITS = 6


def apply(
  key: Key[Array, ""], image: UInt8[Array, "H W 3"]
) -> Float[Array, "H W 3"]:
  """Apply a random operation to an image; the result is in [0, 255]."""
  operation_key, strength_key, sign_key = jax.random.split(key, 3)
  return operate(
    image,
    jax.random.randint(operation_key, (), 0, len(OPERATIONS)),
    jax.random.randint(strength_key, (), 0, _STRENGTHS) / (_STRENGTHS - 1),
    jax.random.rademacher(sign_key, (), jnp.float32),
  )


def operate(
  image: UInt8[Array, "H W 3"],
  operation: Int[Array, ""],
  strength: Float[Array, ""],
  sign: Float[Array, ""],
) -> Float[Array, "H W 3"]:
  """Apply an operation to an image; the result is in [0, 255].

  All geometric operations are one warp, which is the identity for the others.

  Args:
    image: values in [0, 255].
    operation: index in `OPERATIONS`.
    strength: in [0, 1].
    sign: -1 or 1, for operations with a direction.
  """

  def amount(*names):
    chosen = jnp.array([operation == OPERATIONS.index(n) for n in names])
    return jnp.where(chosen, sign * strength, 0.0)

  x = warp(
    image.astype(jnp.float32),
    shear=_SHEAR * amount("shear_x", "shear_y"),
    shift=_SHIFT * amount("translate_x", "translate_y"),
    angle=_ANGLE * amount("rotate")[0],
  )
  colours = [
    functools.partial(_COLOURS[name], strength, sign)
    if name in _COLOURS
    else lambda x: x
    for name in OPERATIONS
  ]
  return jax.lax.switch(operation, colours, x)


def warp(
  image: Float[Array, "H W C"],
  shear: Float[Array, "2"],
  shift: Float[Array, "2"],
  angle: Float[Array, ""],
) -> Float[Array, "H W C"]:
  """Shear and shift an image from its top left corner, rotate about its centre.

  As in Pillow, the transform maps a pixel of the result to a position in the
  image. Positions outside the image are black.

  Args:
    image: any values.
    shear: shear of x by y and of y by x.
    shift: shift of x and y in pixels.
    angle: counterclockwise, in radians.
  """
  height, width, _ = image.shape
  x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
  u, v = x - width / 2, y - height / 2  # From the centre.
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  from_x = width / 2 + cos * u - sin * v + shear[0] * y + shift[0]
  from_y = height / 2 + sin * u + cos * v + shear[1] * x + shift[1]
  interpolate = functools.partial(
    ndimage.map_coordinates,
    coordinates=[from_y - 0.5, from_x - 0.5],
    order=1,
    mode="nearest",
  )
  inside = (0 <= from_x) & (from_x < width)
  inside &= (0 <= from_y) & (from_y < height)
  return jnp.where(inside[..., None], jax.vmap(interpolate, -1, -1)(image), 0.0)


# Below, images x are [H, W, 3] float32, integers in [0, 255].


def _enhance(degenerate, strength, sign, x):
  """Move an image away from a degenerate one, or towards it (ImageEnhance)."""
  base = degenerate(x)
  factor = 1 + _ENHANCEMENT * sign * strength
  return jnp.clip(base + factor * (x - base), 0.0, 255.0)


def _grey(x):
  """Return the luma, Pillow's mode L (ITU-R 601-2), as [H, W, 1]."""
  weights = jnp.array([0.299, 0.587, 0.114])
  return (x * weights).sum(-1, keepdims=True)


def _smooth(x):
  """Apply Pillow's filter SMOOTH, which does not change the border."""
  sums = jax.lax.reduce_window(
    x, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "valid"
  )
  inside = slice(1, -1), slice(1, -1)
  return x.at[inside].set((sums + 4 * x[inside]) / 13)


def _posterize(strength, sign, x):
  del sign
  unit = 2.0 ** jnp.round(_POSTERIZE_BITS * strength)
  return jnp.floor(x / unit) * unit


def _solarize(strength, sign, x):
  del sign
  return jnp.where(x >= 255 * (1 - strength), 255 - x, x)


def _autocontrast(strength, sign, x):
  """Stretch each channel to the whole range."""
  del strength, sign
  low, high = x.min((0, 1)), x.max((0, 1))
  stretched = (x - low) * 255 / jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, x)


def _equalize(strength, sign, x):
  """Equalize the histogram of each channel, as PIL.ImageOps.equalize."""
  del strength, sign

  def equalize(channel):
    histogram = jnp.bincount(channel.ravel(), length=256)
    step = (channel.size - histogram[channel.max()]) // 255
    before = jnp.cumsum(histogram) - histogram
    table = jnp.minimum((before + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[channel], channel)

  equalized = jax.vmap(equalize, -1, -1)(x.astype(jnp.int32))
  return equalized.astype(jnp.float32)


_COLOURS: dict[str, Callable[..., jax.Array]] = {
  "brightness": functools.partial(_enhance, jnp.zeros_like),
  "color": functools.partial(_enhance, _grey),
  "contrast": functools.partial(_enhance, lambda x: _grey(x).mean()),
  "sharpness": functools.partial(_enhance, _smooth),
  "posterize": _posterize,
  "solarize": _solarize,
  "autocontrast": _autocontrast,
  "equalize": _equalize,
}
OPERATIONS = (
  "identity",
  "shear_x",
  "shear_y",
  "translate_x",
  "translate_y",
  "rotate",
  *_COLOURS,
)
