"""Label smoothing, mixup and CutMix against values computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rescalevit_jax.augment import mixing

LABELS = np.array([2, 0, 1, 2], np.int32)


def keys_of(number, seed=0):
  return jax.random.split(jax.random.key(seed), number)


def noise(batch, size):
  rng = np.random.default_rng(0)
  return rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("settings", "num_classes"))
def mix(keys, images, labels, settings, num_classes=3):
  return mixing.mix(keys, images, labels, num_classes, settings)


@functools.cache
def weights_of(settings, number=2000, size=16):
  draw = jax.vmap(lambda key: mixing.weights(key, size, settings))
  return np.asarray(jax.jit(draw)(keys_of(number)))


def test_without_mixing_labels_stay_integers():
  images = jnp.asarray(noise(4, 8))
  got, labels = mixing.mix(keys_of(4), images, LABELS, 3, mixing.NOTHING)
  assert got is images and labels is LABELS


def test_label_smoothing_by_hand():
  images = noise(4, 8)
  settings = mixing.Mixing(label_smoothing=0.3)
  got, targets = mix(keys_of(4), images, LABELS, settings)
  np.testing.assert_array_equal(got, images)
  want = [[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
  np.testing.assert_allclose(targets, want, atol=1e-6)


SETTINGS = [
  mixing.Mixing(mixup=0.4),
  mixing.Mixing(cutmix=1.0),
  mixing.Mixing(0.1, mixup=0.4, cutmix=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_image_and_label_are_mixed_with_the_previous_ones(settings):
  images, labels = noise(12, 8), np.arange(12, dtype=np.int32)
  got, targets = mix(keys_of(12), images, labels, settings, 12)
  assert (got.shape, got.dtype) == (images.shape, jnp.float32)
  smoothing = settings.label_smoothing
  shares = set()
  for i in range(12):
    # Solve for the weight of the image's own pixel: [S, S, 3].
    own = (got[i] - images[i - 1]) / (images[i] - images[i - 1])
    own = np.median(own, axis=-1)
    share = own.mean()
    want = np.full(12, smoothing / 12)
    want[i] += (1 - smoothing) * share
    want[i - 1] += (1 - smoothing) * (1 - share)
    np.testing.assert_allclose(targets[i], want, atol=1e-4)
    shares.add(round(float(share), 5))
  assert len(shares) > 3
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_mixup_draws_one_beta_weight_per_image(alpha):
  weights = weights_of(mixing.Mixing(mixup=alpha))
  assert (weights == weights[:, :1, :1]).all()
  shares = weights[:, 0, 0]
  assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def box_shares(alpha, number, size):
  """Draw CutMix's boxes as its code does, without rounding to pixels."""
  rng = np.random.default_rng(0)
  edge = size * np.sqrt(1 - rng.beta(alpha, alpha, number))
  area = 1.0
  for center in rng.uniform(0, size, (2, number)):
    low = np.maximum(center - edge / 2, 0)
    area = area * (np.minimum(center + edge / 2, size) - low) / size
  return 1 - area


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_cutmix_boxes_have_the_papers_sizes(alpha):
  weights = weights_of(mixing.Mixing(cutmix=alpha), size=64)
  assert set(np.unique(weights)) == {0.0, 1.0}
  for cut in 1 - weights[:200]:
    rows, columns = cut.max(1), cut.max(0)
    np.testing.assert_array_equal(cut, rows[:, None] * columns)
    for axis in (rows, columns):  # The box is contiguous.
      assert (np.diff(axis) > 0).sum() + (np.diff(axis) < 0).sum() <= 2
  want = box_shares(alpha, 5000, 64)
  assert stats.ks_2samp(weights.mean((1, 2)), want).statistic < 0.06
  cut = 1 - weights.mean(0)
  assert cut[32, 32] > cut[0, 32] > cut[0, 0]
  np.testing.assert_allclose(cut, cut.T, atol=0.06)


def test_mixup_and_cutmix_each_apply_to_half_of_the_images():
  weights = weights_of(mixing.Mixing(mixup=1.0, cutmix=1.0))
  flat = (weights == weights[:, :1, :1]).all((1, 2)) & (weights.max((1, 2)) < 1)
  assert 0.45 < flat.mean() < 0.55
  assert np.isin(weights[~flat], (0, 1)).all()


def test_an_images_weights_depend_on_its_key_only():
  keys, images = keys_of(6), noise(6, 8)
  settings = SETTINGS[-1]
  together, _ = mix(keys, images, np.zeros(6, np.int32), settings)
  apart, _ = mix(keys[2:4], images[2:4], np.zeros(2, np.int32), settings)
  np.testing.assert_allclose(apart[1], together[3], atol=1e-6)
