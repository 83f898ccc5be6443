"""Augmentation against Pillow and a plain implementation of the crop."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import stats

from rescalevit_jax.augment import preprocess
from rescalevit_jax.augment import rand_augment
from rescalevit_jax.augment import trivial_augment

BILINEAR = Image.Resampling.BILINEAR


def noise(batch, height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (batch, height, width, 3), np.uint8)


def pillow(image, box, size):
  """Crop and resize [H, W, 3] with Pillow, without rounding to integers."""
  top, left, height, width = (int(x) for x in box)
  crop = image[top : top + height, left : left + width].astype(np.float32)
  channels = [
    np.asarray(Image.fromarray(crop[:, :, c]).resize((size, size), BILINEAR))
    for c in range(3)
  ]
  return np.stack(channels, axis=-1) / 127.5 - 1


def keys_of(number, seed=0):
  return jax.random.split(jax.random.key(seed), number)


# Resizing along one axis.


@pytest.mark.parametrize(
  "start, length, old, new",
  [
    (0, 32, 32, 224),  # Upscale the whole axis.
    (0, 32, 32, 48),
    (3, 7, 32, 224),  # Upscale a crop.
    (25, 7, 32, 64),  # Crop at the edge.
    (5, 1, 32, 16),  # Crop of one pixel.
    (0, 48, 48, 12),  # Downscale by an integer.
    (4, 41, 48, 13),  # Downscale a crop by another factor.
    (0, 300, 300, 32),
    (2, 20, 32, 19),  # Factor near 1.
  ],
)
def test_resize_matrix_equals_pillows_bilinear_resize(start, length, old, new):
  axis = np.random.default_rng(0).uniform(0, 255, old).astype(np.float32)
  crop = Image.fromarray(axis[None, start : start + length])
  want = np.asarray(crop.resize((new, 1), BILINEAR))[0]
  matrix = preprocess.resize_matrix(start, length, old, new)
  assert matrix.shape == (new, old)
  np.testing.assert_allclose(np.asarray(matrix) @ axis, want, atol=2e-3)


@pytest.mark.parametrize("size", [1, 7, 32])
def test_resize_matrix_at_the_same_size_is_the_identity(size):
  matrix = preprocess.resize_matrix(0, size, size, size)
  np.testing.assert_array_equal(matrix, np.eye(size))


@pytest.mark.parametrize("length", [1, 2, 9, 24])
@pytest.mark.parametrize("new", [1, 5, 24, 100])
def test_rows_of_resize_matrix_sum_to_one_within_the_crop(length, new):
  matrix = np.asarray(preprocess.resize_matrix(6, length, 30, new))
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
  assert (matrix >= 0).all()
  assert (matrix[:, :6] == 0).all()
  assert (matrix[:, 6 + length :] == 0).all()


# Whole images.


@pytest.mark.parametrize(
  "height, width, size", [(32, 32, 48), (32, 32, 20), (24, 40, 32)]
)
def test_prepare_equals_pillows_resize(height, width, size):
  images = noise(2, height, width)
  got = preprocess.prepare(images, size)
  assert (got.shape, got.dtype) == ((2, size, size, 3), jnp.float32)
  for ours, image in zip(got, images, strict=True):
    want = pillow(image, (0, 0, height, width), size)
    np.testing.assert_allclose(ours, want, atol=2e-5)


def test_prepare_at_the_same_size_only_scales_values():
  images = noise(2, 16, 16)
  want = images.astype(np.float32) / np.float32(127.5) - 1
  np.testing.assert_allclose(preprocess.prepare(images, 16), want, atol=1e-7)


def test_range_of_uint8_becomes_exactly_minus_one_to_one():
  images = np.zeros((1, 4, 4, 3), np.uint8)
  images[0, 0] = 255
  got = np.asarray(preprocess.prepare(images, 4))
  assert (got[0, 0] == 1).all()
  assert (got[0, 1:] == -1).all()
  resized = np.asarray(preprocess.prepare(images, 8))
  assert resized.min() >= -1
  assert resized.max() <= 1


# The crop's box.


@functools.cache
def boxes_of(number, height, width, min_area, min_aspect, seed=0):
  """Draw boxes [number, 4]: top, left, height, width."""
  box = functools.partial(
    preprocess.random_box,
    height=height,
    width=width,
    min_area=min_area,
    min_aspect=min_aspect,
  )
  return np.asarray(jax.jit(jax.vmap(box))(keys_of(number, seed)))


def center_box(height, width, min_aspect):
  """Return the largest centered box with an allowed width / height."""
  w, h = width, height
  if width > height / min_aspect:
    w = round(height / min_aspect)
  elif height > width / min_aspect:
    h = round(width / min_aspect)
  return (height - h) // 2, (width - w) // 2, h, w


def plain_boxes(number, height, width, min_area, min_aspect, seed=0):
  """Draw boxes with a plain Python implementation."""
  rng = np.random.default_rng(seed)
  boxes = []
  for _ in range(number):
    box = center_box(height, width, min_aspect)
    for _ in range(10):
      area = rng.uniform(min_area, 1) * height * width
      aspect = math.exp(
        rng.uniform(math.log(min_aspect), -math.log(min_aspect))
      )
      h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
      if 1 <= h <= height and 1 <= w <= width:
        top, left = rng.integers(0, height - h + 1), rng.integers(width - w + 1)
        box = top, left, h, w
        break
    boxes.append(box)
  return np.array(boxes)


SETTINGS = [
  (32, 32, 0.05, 3 / 4),
  (24, 40, 0.05, 3 / 4),
  (40, 24, 0.2, 1 / 2),
  (32, 96, 0.22, 3 / 4),  # About one in six falls back to the center.
]


@pytest.mark.parametrize("height, width, min_area, min_aspect", SETTINGS)
def test_random_box_has_the_distribution_of_plain_boxes(
  height, width, min_area, min_aspect
):
  setting = height, width, min_area, min_aspect
  ours, plain = boxes_of(5000, *setting), plain_boxes(5000, *setting)
  center = center_box(height, width, min_aspect)
  shares = []
  for boxes in (ours, plain):
    shares.append((boxes == center).all(1).mean())
  assert shares[0] == pytest.approx(shares[1], abs=0.02)

  def quantities(boxes):
    top, left, h, w = boxes.astype(np.float64).T
    yield "area", h * w
    yield "log aspect", np.log(w / h)
    yield "height", h
    yield "width", w
    free = (h < height) & (w < width)
    yield "top", (top / np.maximum(1, height - h))[free]
    yield "left", (left / np.maximum(1, width - w))[free]

  for (name, a), (_, b) in zip(
    quantities(ours), quantities(plain), strict=True
  ):
    assert stats.ks_2samp(a, b).pvalue > 1e-3, name


@pytest.mark.parametrize("height, width, min_area, min_aspect", SETTINGS)
def test_random_box_draws_independent_numbers(
  height, width, min_area, min_aspect
):
  setting = height, width, min_area, min_aspect
  center = center_box(height, width, min_aspect)

  def correlations(boxes):
    drawn = boxes[(boxes != center).any(1)]
    top, left, h, w = drawn[(drawn[:, 2:] < (height, width)).all(1)].T
    return np.corrcoef(
      [h * w, np.log(w / h), top / (height - h), left / (width - w)]
    )

  got = correlations(boxes_of(5000, *setting))
  want = correlations(plain_boxes(5000, *setting))
  np.testing.assert_allclose(got, want, atol=0.1)


@pytest.mark.parametrize("height, width, min_area, min_aspect", SETTINGS)
def test_random_box_lies_inside_with_allowed_area_and_aspect(
  height, width, min_area, min_aspect
):
  boxes = boxes_of(5000, height, width, min_area, min_aspect)
  assert np.issubdtype(boxes.dtype, np.integer)
  top, left, h, w = boxes.T
  assert (top >= 0).all()
  assert (left >= 0).all()
  assert (h >= 1).all()
  assert (w >= 1).all()
  assert (top + h <= height).all()
  assert (left + w <= width).all()
  # Rounding moves edges by at most half a pixel.
  drawn = ~(boxes == center_box(height, width, min_aspect)).all(1)
  assert drawn.mean() > 0.5
  assert (((h + 0.5) * (w + 0.5))[drawn] >= min_area * height * width).all()
  assert (((w + 0.5) / (h - 0.5))[drawn] >= min_aspect).all()
  assert (((w - 0.5) / (h + 0.5))[drawn] <= 1 / min_aspect).all()
  # Draws cover both ranges.
  assert (h * w)[drawn].min() < 1.3 * min_area * height * width
  assert top.min() == left.min() == 0
  assert (top + h).max() == height
  assert (left + w).max() == width


@pytest.mark.parametrize(
  "height, width, expected",
  [(4, 400, (0, 197, 4, 5)), (400, 4, (197, 0, 5, 4))],
)
def test_box_is_the_center_if_no_draw_fits(height, width, expected):
  boxes = boxes_of(20, height, width, 0.9, 3 / 4)
  assert (boxes == expected).all()


# Random crops and flips.


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def prepare_random(keys, images, size, settings):
  return preprocess.prepare_random(keys, images, size, settings)


def ramp(height, width):
  """Return an image with red by column and green by row."""
  image = np.zeros((height, width, 3), np.uint8)
  image[:, :, 0] = 4 * np.arange(width)
  image[:, :, 1] = 4 * np.arange(height)[:, None]
  return image


def box_seen_in(pixels):
  """Return the box of a resized ramp [S, S, 3], from its middle half."""
  size = len(pixels)
  values = (np.asarray(pixels, np.float64) + 1) * 127.5 / 4
  middle = np.arange(size // 4, 3 * size // 4)
  start_and_length = []
  for line in (values[:, size // 2, 1], values[size // 2, :, 0]):
    slope, offset = np.polyfit(middle + 0.5, line[middle] + 0.5, 1)
    start_and_length.append((offset, slope * size))
  (top, height), (left, width) = start_and_length
  return top, left, height, width


@pytest.mark.parametrize("height, width", [(32, 32), (24, 60), (60, 24)])
def test_random_crop_equals_pillows_resize_of_a_box(height, width):
  image = ramp(height, width)
  image[:, :, 2] = noise(1, height, width)[0, :, :, 2]
  images = np.stack([image] * 24)
  settings = preprocess.Augment(min_area=0.3)
  got = prepare_random(keys_of(24), images, 48, settings)
  assert (got.shape, got.dtype) == ((24, 48, 48, 3), jnp.float32)
  boxes = set()
  for pixels in got:
    seen = box_seen_in(pixels)
    box = tuple(round(x) for x in seen)
    np.testing.assert_allclose(seen, box, atol=0.02)
    np.testing.assert_allclose(pixels, pillow(image, box, 48), atol=2e-5)
    boxes.add(box)
  assert len(boxes) > 16


def test_crop_settings_limit_area_and_aspect():
  images = np.stack([ramp(40, 40)] * 200)
  # Aspect within 2 % of square; the tolerances allow for rounding.
  settings = preprocess.Augment(min_area=0.7, min_aspect=0.98)
  got = prepare_random(keys_of(200), images, 48, settings)
  boxes = np.array([box_seen_in(x) for x in got])
  areas = boxes[:, 2] * boxes[:, 3] / 1600
  assert 0.66 < areas.min() < 0.74
  assert np.abs(np.log(boxes[:, 3] / boxes[:, 2])).max() < 0.06


EVERYTHING = {"flip": True, "auto": "trivial", "random_erasing": 0.5}


@pytest.mark.parametrize(
  "settings",
  [
    preprocess.Augment(flip=True),
    preprocess.Augment(crop=False, flip=True),
    preprocess.Augment(**EVERYTHING),
    preprocess.Augment(crop=False, pad_crop=3, **EVERYTHING),
    preprocess.Augment(auto="rand", color_jitter=0.5),
  ],
)
def test_augmentation_depends_on_the_images_key_only(settings):
  images, keys = noise(8, 16, 16), keys_of(8)
  together = prepare_random(keys, images, 20, settings)
  order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
  permuted = prepare_random(keys[order], images[order], 20, settings)
  np.testing.assert_allclose(permuted, together[order], atol=1e-6)
  others = noise(8, 16, 16, seed=1)
  others[3] = images[3]
  other_keys = jnp.where(jnp.arange(8) == 3, keys, keys_of(8, seed=1))
  among_others = prepare_random(other_keys, others, 20, settings)
  np.testing.assert_allclose(among_others[3], together[3], atol=1e-6)


def test_other_keys_give_other_crops():
  images = np.stack([noise(1, 32, 32)[0]] * 16)
  got = prepare_random(keys_of(16), images, 8, preprocess.Augment())
  assert len(np.unique(np.asarray(got).reshape(16, -1), axis=0)) > 12


@pytest.mark.parametrize("crop", [True, False])
def test_flip_mirrors_half_of_the_images_left_to_right(crop):
  images, keys = noise(200, 8, 8), keys_of(200)
  plain = prepare_random(keys, images, 8, preprocess.Augment(crop=crop))
  got = prepare_random(
    keys, images, 8, preprocess.Augment(crop=crop, flip=True)
  )
  same = np.abs(got - plain).max((1, 2, 3)) < 1e-6
  mirrored = np.abs(got - plain[:, :, ::-1]).max((1, 2, 3)) < 1e-6
  assert (same | mirrored).all()
  assert 70 < mirrored.sum() < 130


def test_without_crop_and_flip_training_images_equal_evaluation_images():
  images = noise(3, 12, 20)
  settings = preprocess.Augment(crop=False)
  got = prepare_random(keys_of(3), images, 16, settings)
  want = preprocess.prepare(images, 16)
  np.testing.assert_allclose(got, want, atol=1e-6)


# Options that are off by default.


def test_pad_crop_shifts_images_with_black_padding():
  image = 1 + noise(1, 10, 14)[0] // 2
  images = np.stack([image] * 200)
  settings = preprocess.Augment(crop=False, pad_crop=2)
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0))).astype(np.float32)
  want = {}
  for top in range(5):
    for left in range(5):
      part = padded[top : top + 10, left : left + 14] / np.float32(127.5) - 1
      want[top, left] = preprocess.prepare(part[None] * 127.5 + 127.5, 12)[0]
  seen = []
  for pixels in prepare_random(keys_of(200), images, 12, settings):
    (place,) = [k for k, v in want.items() if np.abs(pixels - v).max() < 1e-3]
    seen.append(place)
  for axis in np.array(seen).T:
    counts = np.bincount(axis, minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-3
  assert len(set(seen)) == 25


def test_pad_crop_at_the_same_size_only_shifts_pixels():
  images = noise(16, 8, 8)
  settings = preprocess.Augment(crop=False, pad_crop=1)
  got = prepare_random(keys_of(16), images, 8, settings)
  for image, pixels in zip(images, got, strict=True):
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    parts = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    values = np.rint((pixels + 1) * 127.5)
    np.testing.assert_allclose((pixels + 1) * 127.5, values, atol=1e-3)
    assert any((values == part).all() for part in parts)


def test_trivial_augment_comes_before_the_crop():
  images, keys = noise(8, 12, 12), keys_of(8)
  own = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
  changed = jax.vmap(trivial_augment.apply)(own, images)
  settings = preprocess.Augment(auto="trivial", flip=True)
  got = prepare_random(keys, images, 16, settings)
  want = prepare_random(keys, changed, 16, preprocess.Augment(flip=True))
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(
    got - prepare_random(keys, images, 16, preprocess.Augment())
  ).max()


def test_rand_augment_and_jitter_come_before_the_crop():
  images, keys = noise(8, 12, 12), keys_of(8)

  def change(key, image):
    x = rand_augment.apply(jax.random.fold_in(key, 2), image, 3, 5.0)
    return rand_augment.jitter(jax.random.fold_in(key, 4), x, 0.5)

  changed = jax.vmap(change)(keys, images)
  settings = preprocess.Augment(
    auto="rand", rand_ops=3, rand_magnitude=5.0, color_jitter=0.5
  )
  got = prepare_random(keys, images, 16, settings)
  want = prepare_random(keys, changed, 16, preprocess.Augment())
  np.testing.assert_allclose(got, want, atol=0.01)


def test_erased_boxes_have_the_papers_sizes():
  images, keys = np.full((1500, 40, 40, 3), 255, np.uint8), keys_of(1500)
  settings = preprocess.Augment(crop=False, random_erasing=0.7)
  got = np.asarray(prepare_random(keys, images, 40, settings))
  erased = (np.abs(got - 1) > 1e-4).any(-1)
  hit = erased.any((1, 2))
  assert 0.65 < hit.mean() < 0.75
  rows, columns = erased.any(2), erased.any(1)
  assert (erased == rows[:, :, None] & columns[:, None]).all()
  for axis in (rows, columns):  # The box is contiguous.
    assert (np.diff(axis, axis=1).sum(1) <= 2).all()
  h, w = rows.sum(1)[hit], columns.sum(1)[hit]
  areas = h * w / 1600
  assert 0.01 < areas.min() < 0.04 and 0.36 < areas.max() < 0.43
  aspects = np.log(w / h)
  assert abs(aspects.mean()) < 0.1
  assert 0.9 < np.abs(aspects).max() < 1.5  # log(1 / 0.3) is 1.2.
  values = got[erased]
  assert stats.kstest(values.ravel()[:5000], stats.uniform(-1, 2).cdf)[1] > 1e-3


def test_erasing_does_not_change_other_pixels_and_crops():
  images, keys = noise(20, 16, 16), keys_of(20)
  got = prepare_random(keys, images, 16, preprocess.Augment(random_erasing=1.0))
  plain = prepare_random(keys, images, 16, preprocess.Augment())
  same = np.asarray(got == plain).all(-1)
  assert 0.5 < same.mean() < 0.95
  assert (same.mean((1, 2)) < 1).all()
