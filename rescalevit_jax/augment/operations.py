"""Operations of automatic augmentation on one image, on the device.

They equal Pillow's, without rounding and with bilinear interpolation. An
operation has one number as its argument:

  identity, invert, autocontrast, equalize    none
  shear_x, shear_y                            shear
  translate_x, translate_y                    shift in pixels
  rotate                                      angle in radians, counterclockwise
  brightness, color, contrast, sharpness      factor; 1: no change
  posterize                                   number of bits to set to 0
  solarize                                    threshold of the values to invert
  solarize_add                                amount to add to values below 128
"""

from collections.abc import Callable, Mapping
import functools

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, ArrayLike, Float, Int, Num


def operate(
  image: Num[Array, "H W 3"],
  operation: Int[Array, ""],
  arguments: Mapping[str, ArrayLike],
  fill: float = 0.0,
) -> Float[Array, "H W 3"]:
  """Apply one of several operations to integers in [0, 255].

  `arguments` has the argument of each operation by its name; `operation` is an
  index into it. All geometric operations are one warp, the identity for other
  operations; `arguments` must contain all of them. Positions outside the image
  become `fill`. The result is in [0, 255].
  """
  names = list(arguments)
  argument = jnp.array(list(arguments.values()), jnp.float32)[operation]

  def chosen(*wanted):
    hits = [operation == names.index(name) for name in wanted]
    return jnp.where(jnp.array(hits), argument, 0.0)

  x = warp(
    image.astype(jnp.float32),
    shear=chosen("shear_x", "shear_y"),
    shift=chosen("translate_x", "translate_y"),
    angle=chosen("rotate")[0],
    fill=fill,
  )
  colors = [COLORS.get(name, lambda _, x: x) for name in names]
  return jax.lax.switch(operation, colors, argument, x)


def warp(
  image: Float[Array, "H W C"],
  shear: Float[Array, "2"],
  shift: Float[Array, "2"],
  angle: Float[Array, ""],
  fill: float = 0.0,
) -> Float[Array, "H W C"]:
  """Shear and shift an image from its top left corner, rotate about its center.

  As in Pillow, the transform maps a pixel of the result to a position in the
  image, or to `fill` outside of it. The shear is of x by y and of y by x, the
  shift is in pixels, and the angle is counterclockwise, in radians.
  """
  height, width, _ = image.shape
  x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
  u, v = x - width / 2, y - height / 2  # From the center.
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
  return jnp.where(
    inside[..., None], jax.vmap(interpolate, -1, -1)(image), fill
  )


# Below, images x are [H, W, 3] float32, integers in [0, 255].


def _enhance(degenerate, factor, x):
  """Move an image away from a degenerate one, or toward it (ImageEnhance)."""
  base = degenerate(x)
  return jnp.clip(base + factor * (x - base), 0.0, 255.0)


def _gray(x):
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


def _posterize(bits, x):
  """Set the lowest bits to 0."""
  unit = 2.0**bits
  return jnp.floor(x / unit) * unit


def _solarize(threshold, x):
  return jnp.where(x >= threshold, 255 - x, x)


def _solarize_add(amount, x):
  return jnp.where(x < 128, jnp.minimum(x + amount, 255), x)


def _invert(_, x):
  return 255 - x


def _autocontrast(_, x):
  """Stretch each channel to the whole range."""
  low, high = x.min((0, 1)), x.max((0, 1))
  stretched = (x - low) * 255 / jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, x)


def _equalize(_, x):
  """Equalize the histogram of each channel, as PIL.ImageOps.equalize."""

  def equalize(channel):
    histogram = jnp.bincount(channel.ravel(), length=256)
    step = (channel.size - histogram[channel.max()]) // 255
    before = jnp.cumsum(histogram) - histogram
    table = jnp.minimum((before + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[channel], channel)

  equalized = jax.vmap(equalize, -1, -1)(x.astype(jnp.int32))
  return equalized.astype(jnp.float32)


COLORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "brightness": functools.partial(_enhance, jnp.zeros_like),
  "color": functools.partial(_enhance, _gray),
  "contrast": functools.partial(_enhance, lambda x: _gray(x).mean()),
  "sharpness": functools.partial(_enhance, _smooth),
  "posterize": _posterize,
  "solarize": _solarize,
  "solarize_add": _solarize_add,
  "invert": _invert,
  "autocontrast": _autocontrast,
  "equalize": _equalize,
}
