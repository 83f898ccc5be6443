"""Norms: formulas, gradients and calibration."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import models
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import identity
from rescalevit_jax.models.norms import pointwise
from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import normalization

D = 6
X = np.random.default_rng(0).normal(0.5, 2.0, (3, 4, D)).astype(np.float32)
SCALE = np.linspace(0.5, 1.5, D).astype(np.float32)
BIAS = np.linspace(-0.3, 0.4, D).astype(np.float32)
MEAN = np.linspace(-1, 1, D).astype(np.float32)
ERF = np.vectorize(math.erf)


def variables(norm):
  params = {"scale": SCALE, "bias": BIAS, "alpha": np.array([0.7], np.float32)}
  names = {
    "RMS": ("scale",),
    "DyT": ("alpha", "scale", "bias"),
    "Derf": ("alpha", "shift", "scale", "bias"),
    "Cal": ("alpha", "scale", "bias"),
  }[norm]
  params["shift"] = np.array([0.2], np.float32)
  found = {"params": {name: params[name] for name in names}}
  if norm == "Cal":
    found["batch_stats"] = {"init_mean": MEAN}
  return found


def by_hand(norm, x):
  x = x.astype(np.float64)
  if norm == "RMS":
    return SCALE * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return (
    BIAS
    + SCALE
    * {
      "DyT": lambda: np.tanh(0.7 * x),
      "Derf": lambda: ERF(0.7 * x + 0.2),
      "Cal": lambda: 0.7 * (x - MEAN),
    }[norm]()
  )


@pytest.mark.parametrize("norm", ["RMS", "DyT", "Derf", "Cal"])
@pytest.mark.parametrize("train", [False, True])
def test_formula(norm, train):
  module = norms.NORMS[norm](D)
  y = module.apply(variables(norm), X, train)
  np.testing.assert_allclose(y, by_hand(norm, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "DyT", "Derf", "Cal"])
def test_gradient_equals_finite_differences(norm):
  """Test the input and each parameter in a random direction."""
  module, start = norms.NORMS[norm](D), variables(norm)
  rng = np.random.default_rng(1)
  weights = rng.normal(size=X.shape)
  fixed = {k: v for k, v in start.items() if k != "params"}

  def total(params, x):
    y = module.apply({"params": params, **fixed}, x, True)
    return (weights * y).sum()

  with jax.enable_x64(True):
    at = jax.tree.map(np.float64, (start["params"], X))
    gradient = jax.grad(total, argnums=(0, 1))(*at)
    leaves, structure = jax.tree.flatten(at)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
      way = rng.normal(size=leaves[i].shape)
      ends = [
        total(
          *structure.unflatten(
            [*leaves[:i], leaves[i] + h * way] + leaves[i + 1 :]
          )
        )
        for h in (1e-3, -1e-3)
      ]
      # Norms compute in float32.
      want = (ends[0] - ends[1]) / 2e-3
      np.testing.assert_allclose(
        (slope * way).sum(), want, rtol=2e-2, atol=2e-2
      )


@pytest.mark.parametrize("centered", [True, False])
def test_gradient_of_normalize_equals_autodiff(centered):
  def formula(x):
    mean = x.mean(-1, keepdims=True) if centered else 0
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + normalization.EPSILON)

  weights = np.random.default_rng(1).normal(size=X.shape)
  found = jax.grad(
    lambda x: (weights * normalization.normalize(x, (2,), centered)[0]).sum()
  )(X)
  want = jax.grad(lambda x: (weights * formula(x)).sum())(X)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_initial_alpha():
  """Without a calibration DyT and Derf have 0.5, and Cal is the identity."""
  for norm, alpha in (("DyT", 0.5), ("Derf", 0.5), ("Cal", 1.0)):
    found = norms.NORMS[norm](D).init(jax.random.key(0), X, True)
    assert found["params"]["alpha"] == alpha
    assert traits.CALIBRATION not in found
  np.testing.assert_array_equal(pointwise.Cal(D).apply(found, X, True), X)
  np.testing.assert_array_equal(identity.Identity(D).apply({}, X, True), X)


MUTABLE = ["params", "batch_stats", traits.CALIBRATION]


def calibrate(module, start, *batches):
  found = start
  for batch in batches:
    y, found = module.apply(found, batch, True, mutable=MUTABLE)
  return y, found


@pytest.mark.parametrize("norm", ["DyT", "Derf"])
def test_a_calibrated_alpha_is_one_over_rms(norm):
  y, found = calibrate(norms.NORMS[norm](D), variables(norm), X)
  alpha = found["params"].pop("alpha")
  np.testing.assert_allclose(alpha, 1 / np.sqrt((X**2).mean()), rtol=1e-6)
  want = variables(norm)["params"]
  del want["alpha"]
  assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], want))


def test_calibrated_cal_has_mean_0_and_variance_1():
  start = pointwise.Cal(D).init(jax.random.key(0), X, False)
  y, found = calibrate(pointwise.Cal(D), start, X)
  np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-6)
  np.testing.assert_allclose(y.var(), 1, rtol=1e-5)
  mean = X.mean((0, 1))
  np.testing.assert_allclose(found["batch_stats"]["init_mean"], mean, rtol=1e-6)
  alpha = 1 / (X - mean).std()
  np.testing.assert_allclose(found["params"]["alpha"], [alpha], rtol=1e-5)


def test_a_calibration_averages_over_its_batches():
  start = pointwise.Cal(D).init(jax.random.key(0), X, False)
  _, found = calibrate(pointwise.Cal(D), start, X, X + 3, X - 6)
  mean = X.mean((0, 1)) - 1
  np.testing.assert_allclose(found["batch_stats"]["init_mean"], mean, atol=1e-5)
  # About the means known at each of the batches.
  about = [X.mean((0, 1)) + shift for shift in (0, 1.5, -1)]
  squares = [
    np.square(X + s - m).mean() for s, m in zip((0, 3, -6), about, strict=True)
  ]
  alpha = np.mean(squares) ** -0.5
  np.testing.assert_allclose(found["params"]["alpha"], [alpha], rtol=1e-5)


def test_each_site_is_calibrated_after_the_previous_ones():
  model = models.create(
    "ViT-B_16",
    num_classes=3,
    norm="Cal",
    image_size=8,
    patch_size=4,
    hidden_size=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=2,
    dropout_rate=0.0,
  )
  images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3))
  start = model.init(jax.random.key(0), images)
  calibrated = model.apply(start, images, train=True, mutable=MUTABLE)[1]
  calibrated.pop(traits.CALIBRATION)
  _, seen = model.apply(
    calibrated,
    images,
    capture_intermediates=lambda module, method: (
      isinstance(module, pointwise.Cal) and method == "__call__"
    ),
  )
  seen = flax.traverse_util.flatten_dict(seen["intermediates"], sep="/")
  seen = {k: y for k, y in seen.items() if not k.endswith("/attention")}
  assert len(seen) == 2 * 2 + 1
  for name, (y,) in seen.items():
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(y.var(), 1, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("norm", ["Cal", "Rescale"])
def test_as_linear_equals_the_norm_in_evaluation(norm):
  Norm = norms.NORMS[norm]
  start = {"params": {"bias": BIAS}, "batch_stats": {"init_mean": MEAN}}
  for count in (3, 8):
    start["batch_stats"]["count"] = np.int32(count)
    found = variables("Cal") if norm == "Cal" else start
    factor, shift = Norm.as_linear(found["params"], found["batch_stats"])
    y = Norm(D).apply(found, X, False)
    np.testing.assert_allclose(factor * X + shift, y, rtol=1e-5, atol=1e-5)


def test_only_norms_that_are_linear_in_evaluation_fold():
  foldable = {
    name
    for name, Norm in norms.NORMS.items()
    if issubclass(Norm, traits.Foldable)
  }
  assert foldable == {"Rescale", "Cal", "Fade"}
