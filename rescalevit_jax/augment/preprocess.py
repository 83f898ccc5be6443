"""uint8 images to model input, on the device, inside the jitted step.

Crop and resize are one bilinear map per axis, so an image [H, W, 3] becomes
rows [S, H] @ image @ columns [S, W]^T: two small matrix products.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from rescalevit_jax.augment import trivial_augment

AUTO = ("none", "trivial")


@dataclasses.dataclass(frozen=True)
class Augment:
  """What training does to an image.

  Attributes:
    crop: whether to take a random crop (RandomResizedCrop) or the whole image.
    min_area: smallest share of the image's area that a crop covers; the largest
      is 1.
    min_aspect: smallest ratio width / height of a crop; the largest is its
      inverse.
    flip: whether half of the images are mirrored left to right.
    pad_crop: pixels; instead of `crop`, the image is shifted by up to so many
      in each direction, and black comes in.
    auto: 'trivial' for a random operation before the crop; see
      `trivial_augment`; or 'none'.
    random_erasing: probability that a box of an image becomes noise.
  """

  crop: bool = True
  min_area: float = 0.05
  min_aspect: float = 3 / 4
  flip: bool = False
  pad_crop: int = 0
  auto: str = "none"
  random_erasing: float = 0.0


def prepare(images: jax.Array, size: int) -> jax.Array:
  """Resizes whole images, for evaluation.

  Args:
    images: [B, H, W, 3] uint8.
    size: edge S of the result.

  Returns:
    [B, S, S, 3] float32 in [-1, 1].
  """
  _, height, width, _ = images.shape
  if height == width == size:
    return _scale(images.astype(jnp.float32))
  rows = resize_matrix(0, height, height, size)
  columns = resize_matrix(0, width, width, size)
  return _scale(_resize(images, rows[None], columns[None]))


def prepare_random(
  keys: jax.Array, images: jax.Array, size: int, augment: Augment
) -> jax.Array:
  """Crops, resizes and flips images at random, for training.

  Args:
    keys: [B] PRNG keys, one an image: its fate depends on nothing else.
    images: [B, H, W, 3] uint8.
    size: edge S of the result.
    augment: what to do.

  Returns:
    [B, S, S, 3] float32 in [-1, 1].
  """
  _, height, width, _ = images.shape
  crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  # Splitting is folding in 0 and 1: other numbers give other keys.
  auto_keys, erase_keys = (
    jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in (2, 3)
  )
  if augment.auto == "trivial":
    images = jax.vmap(trivial_augment.apply)(auto_keys, images)
  draw = functools.partial(
    random_box,
    height=height,
    width=width,
    min_area=augment.min_area,
    min_aspect=augment.min_aspect,
  )
  if augment.pad_crop:
    pad = augment.pad_crop
    draw = functools.partial(random_shift, height=height, width=width, pad=pad)
    images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    _, height, width, _ = images.shape
  if augment.crop or augment.pad_crop:
    box = jax.vmap(draw)(crop_keys)
    matrix = jax.vmap(resize_matrix, in_axes=(0, 0, None, None))
    rows = matrix(box[:, 0], box[:, 2], height, size)
    columns = matrix(box[:, 1], box[:, 3], width, size)
    x = _scale(_resize(images, rows, columns))
  else:
    x = prepare(images, size)
  if augment.flip:
    flip = jax.vmap(jax.random.bernoulli)(flip_keys)
    x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
  if augment.random_erasing:
    x = jax.vmap(erase, (0, 0, None))(erase_keys, x, augment.random_erasing)
  return x


def random_shift(
  key: jax.Array, height: int, width: int, pad: int
) -> jax.Array:
  """Draws a crop of an image's own size out of one with a border.

  He et al. 2016 (arXiv:1512.03385), section 4.2, with a border of 4 pixels.

  Returns:
    [4] int32: top, left, height, width, in pixels of the padded image.
  """
  corner = jax.random.randint(key, (2,), 0, 2 * pad + 1)
  return jnp.concatenate([corner, jnp.array([height, width])])


def erase(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
  """Random erasing: at times, replaces a box by noise.

  Zhong et al. 2020 (arXiv:1708.04896), section 3.2: the box has 2 to 40 % of
  the area and an aspect ratio of 0.3 to 1/0.3, here with a uniform logarithm;
  each of its pixels' values is uniform over their range.

  Args:
    key: a PRNG key.
    image: [S, S, 3] float32 in [-1, 1].
    share: the probability that anything is erased.

  Returns:
    [S, S, 3] float32.
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
  erased = inside & jax.random.bernoulli(coin_key, share)
  return jnp.where(erased, noise, image)


def random_box(
  key: jax.Array,
  height: int,
  width: int,
  min_area: float,
  min_aspect: float,
  tries: int = 10,
  max_area: float = 1.0,
) -> jax.Array:
  """Draws a crop as torchvision's RandomResizedCrop does.

  The area is uniform in [min_area, max_area] of the image's, the logarithm of
  the aspect ratio uniform in [min_aspect, 1 / min_aspect]. The first of ten
  draws that fits the image is placed at random; if none fits, the largest
  centred box with an allowed aspect ratio is taken.

  Returns:
    [4] int32: top, left, height, width, in pixels.
  """
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = (
    height
    * width
    * jax.random.uniform(area_key, (tries,), minval=min_area, maxval=max_area)
  )
  limit = -math.log(min_aspect)
  aspect = jnp.exp(
    jax.random.uniform(aspect_key, (tries,), minval=-limit, maxval=limit)
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
  center = jnp.array(
    [
      (height - center_h) // 2,
      (width - center_w) // 2,
      center_h,
      center_w,
    ]
  )
  return jnp.where(fits.any(), jnp.stack([top, left, h, w]), center)


def resize_matrix(
  start: jax.Array, length: jax.Array, old: int, new: int
) -> jax.Array:
  """Bilinear weights that crop and resize one axis.

  Half-pixel centres; when shrinking, the triangle widens with the scale
  (antialiasing), as in Pillow. Pixels outside the crop have no weight.

  Args:
    start: first pixel of the crop, a scalar.
    length: pixels of the crop, a scalar.
    old: pixels of the axis.
    new: pixels of the result.

  Returns:
    [new, old] float32; each row sums to 1.
  """
  scale = length / new
  center = start + (jnp.arange(new, dtype=jnp.float32)[:, None] + 0.5) * scale
  pixel = jnp.arange(old)[None, :]
  distance = jnp.abs(pixel + 0.5 - center) / jnp.maximum(scale, 1.0)
  inside = (start <= pixel) & (pixel < start + length)
  weight = jnp.where(inside, jnp.maximum(0.0, 1.0 - distance), 0.0)
  return weight / weight.sum(axis=1, keepdims=True)


def _resize(images, rows, columns):
  # Full float32: TF32 would round the pixels.
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  rows = jnp.broadcast_to(rows, (len(images), *rows.shape[1:]))
  columns = jnp.broadcast_to(columns, (len(images), *columns.shape[1:]))
  x = einsum("bsh,bhwc->bswc", rows, images.astype(jnp.float32))
  return einsum("btw,bswc->bstc", columns, x)


def _scale(images):
  return images / 127.5 - 1.0
