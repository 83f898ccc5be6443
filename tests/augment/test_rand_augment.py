"""RandAugment against timm and color jitter against torchvision."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import photos
from PIL import Image
from PIL import ImageOps
import pytest

from rescalevit_jax.augment import rand_augment

_REASON = "needs timm: pip install -e '.[timm]'"
auto_augment = pytest.importorskip("timm.data.auto_augment", reason=_REASON)
functional = pytest.importorskip(
  "torchvision.transforms.functional", reason=_REASON
)

OPERATIONS = rand_augment.OPERATIONS
TIMM = {
  "autocontrast": "AutoContrast",
  "equalize": "Equalize",
  "invert": "Invert",
  "rotate": "Rotate",
  "posterize": "PosterizeIncreasing",
  "solarize": "SolarizeIncreasing",
  "solarize_add": "SolarizeAdd",
  "color": "ColorIncreasing",
  "contrast": "ContrastIncreasing",
  "brightness": "BrightnessIncreasing",
  "sharpness": "SharpnessIncreasing",
  "shear_x": "ShearX",
  "shear_y": "ShearY",
  "translate_x": "TranslateXRel",
  "translate_y": "TranslateYRel",
}


operate = jax.jit(rand_augment.operate)


def test_operations_have_timms_order():
  timms = auto_augment._RAND_INCREASING_TRANSFORMS
  assert [TIMM[name] for name in OPERATIONS] == timms


@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_timms(name, magnitude, monkeypatch):
  image = photos.photo(32, 40)
  for sign in (-1.0, 1.0):
    coin = types.SimpleNamespace(random=lambda sign=sign: sign < 0)
    monkeypatch.setattr(auto_augment, "random", coin)
    timms = auto_augment.AugmentOp(
      TIMM[name],
      prob=1.0,
      magnitude=magnitude,
      hparams={
        "img_mean": (128, 128, 128),
        "interpolation": Image.Resampling.BILINEAR,
      },
    )
    if (name, magnitude) == ("posterize", 10.0):  # timm has a bug here.
      want = ImageOps.posterize(Image.fromarray(image), 1)
    else:
      want = timms(Image.fromarray(image))
    want = np.asarray(want, np.float32)
    got = operate(image, OPERATIONS.index(name), magnitude / 10, sign)
    difference = np.abs(np.asarray(got) - want).max()
    exact = ("equalize", "invert", "posterize", "solarize", "solarize_add")
    # Pillow truncates twice: the result and the image that it blends.
    assert difference <= (0 if name in exact else 1.5)
    assert magnitude == 0 or name == "autocontrast" or (want != image).any()


def test_two_operations_in_a_row_with_probability_one_half():
  image, count = photos.photo(12, 12), 1500
  keys = jax.random.split(jax.random.key(0), count)
  apply = jax.jit(
    jax.vmap(rand_augment.apply, (0, None, None, None)), static_argnums=2
  )
  got = np.asarray(apply(keys, image, 1, 9.0))
  changed = (np.abs(got - image) > 0.5).any((1, 2, 3))
  assert 0.45 < changed.mean() < 0.55
  assert (got == np.rint(got)).all() and got.min() >= 0 and got.max() <= 255
  inverted = np.abs(got - (255 - image)).max((1, 2, 3)) < 0.5
  assert 0.5 / 15 - 0.02 < inverted.mean() < 0.5 / 15 + 0.02
  twice = np.asarray(apply(keys, image, 2, 9.0))
  changed = (np.abs(twice - image) > 0.5).any((1, 2, 3))
  assert 0.7 < changed.mean() < 0.8  # 1 - 1 / 4.


def test_magnitude_is_normal_and_clipped(monkeypatch):
  def show(x, operation, level, sign):
    return jnp.full_like(x, 1000 * level)

  monkeypatch.setattr(rand_augment, "operate", show)
  got = jax.vmap(rand_augment.apply, (0, None, None, None))(
    jax.random.split(jax.random.key(1), 2000), np.zeros((1, 1, 3)), 1, 9.0
  )
  found = np.asarray(got[got[:, 0, 0, 0] > 0]) / 100
  assert found.max() == 10.0
  assert 8.95 < np.median(found) < 9.05
  assert 0.44 < np.std(found[found < 9]) / (1 - 2 / np.pi) ** 0.5 < 0.56


@functools.cache
def jittered():
  image = photos.photo(16, 16)
  keys = jax.random.split(jax.random.key(0), 300)
  jitter = jax.jit(jax.vmap(rand_augment.jitter, (0, None, None)))
  return image, keys, np.asarray(jitter(keys, image, 0.4))


def test_jitter_equals_torchvisions_in_some_order():
  image, keys, got = jittered()
  adjust = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
  )
  orders = set()
  for key, x in zip(keys[:40], got, strict=False):
    factor_key = jax.random.split(key)[1]
    factors = jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4)
    errors = {}
    for order in itertools.permutations(range(3)):
      want = Image.fromarray(image)
      for i in order:
        want = adjust[i](want, float(factors[i]))
      errors[order] = np.abs(x - np.asarray(want, np.float32)).mean()
    best = min(errors, key=errors.get)
    assert errors[best] < 0.5
    orders.add(best)
  assert len(orders) == 6


def test_jitter_of_zero_changes_nothing():
  image, keys, _ = jittered()
  same = rand_augment.jitter(keys[0], jnp.asarray(image), 0.0)
  np.testing.assert_array_equal(same, image)
