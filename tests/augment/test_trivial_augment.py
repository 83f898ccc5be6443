"""TrivialAugment's operations against Pillow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import photos
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest

from rescalevit_jax.augment import trivial_augment

OPERATIONS = trivial_augment.OPERATIONS
ENHANCERS = {
  "brightness": ImageEnhance.Brightness,
  "color": ImageEnhance.Color,
  "contrast": ImageEnhance.Contrast,
  "sharpness": ImageEnhance.Sharpness,
}


operate = jax.jit(trivial_augment.operate)


def pillow(name, image, strength, sign):
  """Apply an operation of the wide search space as in the paper's code."""
  image, value = Image.fromarray(image), sign * strength
  affine = {
    "shear_x": (1, 0.99 * value, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, 0.99 * value, 1, 0),
    "translate_x": (1, 0, 32 * value, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, 32 * value),
  }
  bilinear = Image.Resampling.BILINEAR
  if name in affine:
    method = Image.Transform.AFFINE
    done = image.transform(image.size, method, affine[name], bilinear)
  elif name == "rotate":
    done = image.rotate(135 * value, bilinear)
  elif name in ENHANCERS:
    done = ENHANCERS[name](image).enhance(1 + 0.99 * value)
  elif name == "posterize":
    done = ImageOps.posterize(image, 8 - round(6 * strength))
  elif name == "solarize":
    done = ImageOps.solarize(image, math.ceil(255 * (1 - strength)))
  else:
    functions = {
      "identity": lambda x: x,
      "autocontrast": ImageOps.autocontrast,
      "equalize": ImageOps.equalize,
    }
    done = functions[name](image)
  return np.asarray(done, np.float32)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 7 / 30, 0.8, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pillows(name, strength, sign):
  image = photos.photo(32, 40)
  want = pillow(name, image, strength, sign)
  got = operate(image, OPERATIONS.index(name), strength, sign)
  assert (got.shape, got.dtype) == ((32, 40, 3), jnp.float32)
  difference = np.abs(got - want)
  if name in ("identity", "posterize", "solarize", "equalize"):
    assert (difference == 0).all()
  else:  # Pillow rounds twice: the result and the degenerate image.
    # The edge of the image depends on rounding.
    assert np.mean(difference > 2.5) < 0.005, difference.max()
  if name != "identity" and strength > 0:
    assert np.abs(got - image).mean() > 0.4


def test_constant_channels_do_not_change():
  flat = np.full((8, 8, 3), 77, np.uint8)
  flat[..., 1] = 50
  for name in ("autocontrast", "equalize"):
    got = operate(flat, OPERATIONS.index(name), 0.5, 1.0)
    np.testing.assert_array_equal(got, flat)


@functools.cache
def many():
  """Augment one image, whose first row shows the shift."""
  keys = jax.random.split(jax.random.key(0), 3000)
  image = photos.photo(16, 16)
  apply = jax.jit(jax.vmap(trivial_augment.apply, (0, None)))
  return image, np.asarray(apply(keys, image))


def test_operations_and_strengths_are_uniform():
  image, got = many()
  assert 0 <= got.min() and got.max() <= 255
  number = len(OPERATIONS)
  table = jax.vmap(
    jax.vmap(
      jax.vmap(trivial_augment.operate, (None, None, None, 0)),
      (None, None, 0, None),
    ),
    (None, 0, None, None),
  )
  strengths = np.arange(31, dtype=np.float32) / 30
  signs = np.array([-1.0, 1.0], np.float32)
  want = np.asarray(
    jax.jit(table)(image, np.arange(number), strengths, signs)
  ).reshape(number, 31, 2, -1)
  counts = np.zeros((number, 31, 2))
  for x in got.reshape(len(got), -1):
    same = np.abs(want - x).max(-1) < 1e-3
    assert same.any()
    counts += same / same.sum()
  # Operations with the same result, as at strength 0, share its count.
  shares = counts.sum((1, 2)) / len(got)
  np.testing.assert_allclose(shares, 1 / number, atol=0.03)
  rotations = counts[OPERATIONS.index("rotate"), 1:]
  assert (rotations.sum(1) > 0).mean() > 0.9
  assert 0.35 < rotations[:, 0].sum() / rotations.sum() < 0.65
