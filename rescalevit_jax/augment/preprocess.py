"""Convert uint8 images to model input, inside the jitted step.

Crop and resize are one bilinear map per axis: two small matrix products,
rows [S, H] @ image [H, W, 3] @ columns [S, W]^T.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Num, UInt8

from rescalevit_jax.augment import rand_augment
from rescalevit_jax.augment import trivial_augment

AUTO = ("none", "trivial", "rand")
_TRIES = 10  # Draws of a random box.


@dataclasses.dataclass(frozen=True)
class Augment:
  """Settings of the augmentation: the config keys `augment.*`."""

  crop: bool = True
  min_area: float = 0.05
  min_aspect: float = 3 / 4
  flip: bool = False
  pad_crop: int = 0
  auto: str = "none"
  rand_ops: int = 2
  rand_magnitude: float = 9.0
  color_jitter: float = 0.0
  random_erasing: float = 0.0


def prepare(
  images: Num[Array, "B H W 3"], size: int
) -> Float[Array, "B S S 3"]:
  """Resize whole images, as for evaluation, from [0, 255] to [-1, 1]."""
  _, height, width, _ = images.shape
  if height == width == size:
    return _scale(images.astype(jnp.float32))
  rows = resize_matrix(0, height, height, size)
  columns = resize_matrix(0, width, width, size)
  return _scale(_resize(images, rows[None], columns[None]))


def prepare_random(
  keys: Key[Array, " B"],
  images: UInt8[Array, "B H W 3"],
  size: int,
  augment: Augment,
) -> Float[Array, "B S S 3"]:
  """Augment and resize training images, and scale them to [-1, 1].

  Each key is the only source of randomness of its image.
  """
  _, height, width, _ = images.shape
  crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  # Splitting folds in 0 and 1; other numbers give independent keys.
  auto_keys, erase_keys, jitter_keys = (
    jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in (2, 3, 4)
  )
  if augment.auto == "trivial":
    images = jax.vmap(trivial_augment.apply)(auto_keys, images)
  elif augment.auto == "rand":
    images = jax.vmap(rand_augment.apply, (0, 0, None, None))(
      auto_keys, images, augment.rand_ops, augment.rand_magnitude
    )
  if augment.color_jitter:
    images = jax.vmap(rand_augment.jitter, (0, 0, None))(
      jitter_keys, images, augment.color_jitter
    )
  box = None
  if augment.pad_crop:
    pad = augment.pad_crop
    box = jax.vmap(lambda key: random_shift(key, height, width, pad))(crop_keys)
    images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  elif augment.crop:
    area, aspect = augment.min_area, augment.min_aspect
    box = jax.vmap(lambda key: random_box(key, height, width, area, aspect))(
      crop_keys
    )
  if box is None:
    x = prepare(images, size)
  else:
    _, height, width, _ = images.shape
    matrix = jax.vmap(resize_matrix, in_axes=(0, 0, None, None))
    rows = matrix(box[:, 0], box[:, 2], height, size)
    columns = matrix(box[:, 1], box[:, 3], width, size)
    x = _scale(_resize(images, rows, columns))
  if augment.flip:
    flip = jax.vmap(jax.random.bernoulli)(flip_keys)
    x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
  if augment.random_erasing:
    x = jax.vmap(erase, (0, 0, None))(erase_keys, x, augment.random_erasing)
  return x


def random_shift(
  key: Key[Array, ""], height: int, width: int, pad: int
) -> Int32[Array, "4"]:
  """Draw top, left, height and width of a crop from a padded image.

  The crop has the original size. He et al. 2016 (arXiv:1512.03385, section 4.2)
  pad by 4 pixels.
  """
  corner = jax.random.randint(key, (2,), 0, 2 * pad + 1)
  return jnp.concatenate([corner, jnp.array([height, width])])


def erase(
  key: Key[Array, ""], image: Float[Array, "S S 3"], probability: float
) -> Float[Array, "S S 3"]:
  """Replace a box of an image by noise with some probability.

  Random erasing (Zhong et al. 2020, arXiv:1708.04896, section 3.2): the box
  covers 2 to 40 % of the area. Its aspect ratio is 0.3 to 1/0.3, log-uniform
  here. The noise is uniform in [-1, 1].
  """
  coin_key, box_key, noise_key = jax.random.split(key, 3)
  size = len(image)
  top, left, height, width = random_box(
    box_key, size, size, 0.02, 0.3, max_area=0.4
  )
  pixel = jnp.arange(size)
  rows = (top <= pixel) & (pixel < top + height)
  columns = (left <= pixel) & (pixel < left + width)
  inside = (rows[:, None] & columns)[..., None]
  noise = jax.random.uniform(noise_key, image.shape, minval=-1, maxval=1)
  erased = inside & jax.random.bernoulli(coin_key, probability)
  return jnp.where(erased, noise, image)


def random_box(
  key: Key[Array, ""],
  height: int,
  width: int,
  min_area: float,
  min_aspect: float,
  max_area: float = 1.0,
) -> Int32[Array, "4"]:
  """Draw top, left, height and width of a crop, as RandomResizedCrop does.

  The fraction of the area is uniform in [min_area, max_area]. The aspect ratio
  is log-uniform in [min_aspect, 1 / min_aspect]. The first of ten draws that
  fits the image gets a random position. If none fits, the result is the largest
  centered box with an allowed aspect ratio.
  """
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = (
    height
    * width
    * jax.random.uniform(area_key, (_TRIES,), minval=min_area, maxval=max_area)
  )
  limit = -math.log(min_aspect)
  aspect = jnp.exp(
    jax.random.uniform(aspect_key, (_TRIES,), minval=-limit, maxval=limit)
  )
  widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)
  first = jnp.argmax(fits)
  w, h = widths[first], heights[first]
  top = jax.random.randint(top_key, (), 0, height - h + 1)
  left = jax.random.randint(left_key, (), 0, width - w + 1)

  center_w = min(width, round(height / min_aspect))
  center_h = min(height, round(width / min_aspect))
  corner = (height - center_h) // 2, (width - center_w) // 2
  center = jnp.array([*corner, center_h, center_w])
  return jnp.where(fits.any(), jnp.stack([top, left, h, w]), center)


def resize_matrix(
  start: Int32[Array, ""] | int,
  length: Int32[Array, ""] | int,
  old: int,
  new: int,
) -> Float[Array, "new old"]:
  """Return the bilinear weights that crop and resize one axis.

  Pixels have half-integer centers. When shrinking, the triangle filter widens
  with the scale (antialiasing), as in Pillow. Pixels outside the crop, which
  has `length` pixels from `start`, have weight 0. Each row sums to 1.
  """
  scale = length / new
  center = start + (jnp.arange(new, dtype=jnp.float32)[:, None] + 0.5) * scale
  pixel = jnp.arange(old)[None, :]
  distance = jnp.abs(pixel + 0.5 - center) / jnp.maximum(scale, 1.0)
  inside = (start <= pixel) & (pixel < start + length)
  weight = jnp.where(inside, jnp.maximum(0.0, 1.0 - distance), 0.0)
  return weight / weight.sum(axis=1, keepdims=True)


def _resize(images, rows, columns):
  # In full float32: TF32 would round the pixels.
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  rows = jnp.broadcast_to(rows, (len(images), *rows.shape[1:]))
  columns = jnp.broadcast_to(columns, (len(images), *columns.shape[1:]))
  x = einsum("bsh,bhwc->bswc", rows, images.astype(jnp.float32))
  return einsum("btw,bswc->bstc", columns, x)


def _scale(images):
  return images / 127.5 - 1.0
