"""Norms: formulas, gradients and calibration."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import functions
from rescalevit_jax.models.norms import identity
from rescalevit_jax.models.norms import pointwise
from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import normalization

D = 8
X = np.random.default_rng(0).normal(0.5, 2.0, (3, 4, D)).astype(np.float32)
SCALE = np.linspace(0.5, 1.5, D).astype(np.float32)
BIAS = np.linspace(-0.3, 0.4, D).astype(np.float32)
MEAN = np.linspace(-1, 1, D).astype(np.float32)
ERF = np.vectorize(math.erf)


VALUES = {
  "scale": SCALE,
  "bias": BIAS,
  "alpha": 0.7,
  "beta": 5.0,
  "shift": 0.2,
  "init_mean": MEAN,
  "mean": MEAN,
  "var": SCALE,
  "log_sigma": [-0.5, 1.0],
  "count": 9,
  "faded": 20_000,
  "change": BIAS,
  "gain": MEAN,
  "dividend": 3.0,
  "divisor": 4.0,
  "target": 2.0,
  "bn_scale": MEAN,
  "bn_bias": SCALE,
  "eta": 0.6,
  "lam": 3.0,
}
SHARE = 20_000 / 2**16


@functools.cache
def variables(norm):
  """Return variables of a norm, with a value for each name."""
  shapes = jax.eval_shape(
    lambda: norms.NORMS[norm](D).init(jax.random.key(0), X, False)
  )
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.broadcast_to(
      np.asarray(VALUES[path[-1].key], x.dtype), x.shape
    ),
    shapes,
  )


def u(x):
  return 0.7 * x + 0.2


def rms(x):
  return np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def taper(z):
  gate = np.cos(SHARE * np.pi / 2) ** 2
  return gate * SCALE * z / rms(z) + (1 - gate) * 3 / 4 * (MEAN + BIAS) * z


def centered(x):
  return x - x.mean(-1, keepdims=True)


# Formulas of the papers in float64.
BY_HAND = {
  "RMS": lambda x: SCALE * x / rms(x),
  "TaperLN": lambda x: taper(centered(x)) + BIAS,
  "TaperRMS": taper,
  "BHyT": lambda x: SCALE * np.tanh(3 * x / (10 * rms(x))),
  "Center": lambda x: SCALE * D / (D - 1) * centered(x) + BIAS,
  "DyT": lambda x: SCALE * np.tanh(0.7 * x) + BIAS,
  "Derf": lambda x: SCALE * ERF(u(x)) + BIAS,
  "ISRU": lambda x: SCALE * u(x) / np.sqrt(1 + u(x) ** 2) + BIAS,
  "HardTanh": lambda x: SCALE * np.clip(u(x), -1, 1) + BIAS,
  "Arctan": lambda x: SCALE * np.arctan(u(x)) / (np.pi / 2) + BIAS,
  "Softsign": lambda x: SCALE * u(x) / (1 + np.abs(u(x))) + BIAS,
  "DyISRU": lambda x: SCALE * D**0.5 * x / np.sqrt(5 + x**2) + BIAS,
  "Linear": lambda x: SCALE * 0.7 * x + BIAS,
  "Cal": lambda x: SCALE * 0.7 * (x - MEAN) + BIAS,
}


@pytest.mark.parametrize("norm", BY_HAND)
@pytest.mark.parametrize("train", [False, True])
def test_formula_by_hand(norm, train):
  module = norms.NORMS[norm](D)
  y, _ = module.apply(variables(norm), X, train, mutable=["batch_stats"])
  want = BY_HAND[norm](X.astype(np.float64))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [x for x in norms.NORMS if x != "Identity"])
def test_gradient_equals_finite_differences(norm):
  """Test the input and each parameter in a random direction."""
  module, start = norms.NORMS[norm](D), variables(norm)
  rng = np.random.default_rng(1)
  weights = rng.normal(size=X.shape)
  fixed = {k: v for k, v in start.items() if k != "params"}

  def total(params, x):
    collections = {"params": params, **fixed}
    y, _ = module.apply(collections, x, True, mutable=["batch_stats"])
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
      # Norms use float32.
      want = (ends[0] - ends[1]) / 2e-3
      np.testing.assert_allclose(
        (slope * way).sum(), want, rtol=2e-2, atol=2e-2
      )


@pytest.mark.parametrize("name", functions.FUNCTIONS)
def test_functions_are_bounded_and_their_saturation_threshold_is_correct(name):
  function = functions.FUNCTIONS[name]
  at = np.linspace(-30, 30, 60_001, dtype=np.float32)
  y = np.asarray(function.apply(at))
  slope = np.asarray(jax.vmap(jax.grad(function.apply))(at))
  np.testing.assert_allclose(y, -y[::-1], atol=1e-6)
  assert 0.9 < np.abs(y).max() < 1 + 1e-6
  assert (np.diff(y) >= -1e-6).all()
  flat = slope < 0.1 * slope.max()
  differs = flat != (np.abs(y) > function.saturated)
  assert flat.any() and differs.sum() <= 2  # Rounding at both bounds.


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


def test_initial_alpha_of_each_norm():
  """Without calibration, DyT and Derf have 0.5 and Cal is the identity."""
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


@pytest.mark.parametrize(
  "norm, name", [("DyT", "alpha"), ("Derf", "alpha"), ("DyISRU", "beta")]
)
def test_calibrated_alpha_is_one_over_rms(norm, name):
  y, found = calibrate(norms.NORMS[norm](D), variables(norm), X)
  square = (X**2).mean()
  want = D * square if name == "beta" else 1 / np.sqrt(square)
  np.testing.assert_allclose(found["params"][name], [want], rtol=1e-6)
  changed = {
    name
    for name, x in variables(norm)["params"].items()
    if not np.array_equal(x, found["params"][name])
  }
  assert changed == {name}


@pytest.mark.parametrize("norm", ["DyT", "Cal"])
@pytest.mark.parametrize("alpha", [0.25, base.CALIBRATED])
def test_only_a_calibration_replaces_the_initial_alpha(norm, alpha):
  module = norms.NORMS[norm](D, options=base.Options(alpha=alpha))
  start = module.init(jax.random.key(0), X, False)
  own = norms.NORMS[norm].ALPHA
  assert start["params"]["alpha"] == (own if isinstance(alpha, str) else alpha)
  _, found = calibrate(module, start, X)
  kept = found["params"]["alpha"] == start["params"]["alpha"]
  assert kept == (alpha == 0.25)
  if norm == "Cal":  # The mean is always calibrated.
    assert np.any(found["batch_stats"]["init_mean"])


def test_alpha_init_of_attention_mlp_and_final_norm():
  parse = pointwise.parse_alphas
  assert parse(None) == (None, None, None)
  assert parse("0.5") == parse(0.5) == (0.5, 0.5, 0.5)
  assert parse("calibrated,0.2,3") == ("calibrated", 0.2, 3.0)
  for text in ("", "0", "nan", "-1", "inf", "0.1,0.2", "Calibrated", "1,,1"):
    with pytest.raises(errors.UserError, match="model.alpha_init: "):
      parse(text)
  with pytest.raises(errors.UserError, match="LayerNorm has no alpha"):
    models.create("ViT-XS_4", num_classes=3, alpha_init="0.5")
  model = models.create(
    "ViT-XS_4",
    num_classes=3,
    norm="Softsign",
    alpha_init="0.8,0.2,0.1",
    image_size=8,
    num_layers=1,
  )
  params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
  block = params["Transformer"]["encoderblock_0"]
  sites = (
    *(block[f"Softsign_{number}"] for number in (0, 2)),
    params["Transformer"]["encoder_norm"],
  )
  found = [float(site["alpha"][0]) for site in sites]
  np.testing.assert_allclose(found, [0.8, 0.2, 0.1], rtol=1e-6)
  config = dataclasses.replace(model.config, norm_position="post")
  model = model.clone(config=config)
  params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
  block = params["Transformer"]["encoderblock_0"]
  found = [float(block[f"PostSoftsign_{i}"]["alpha"][0]) for i in (0, 2)]
  np.testing.assert_allclose(found, [0.8, 0.1], rtol=1e-6)


def test_center_needs_two_channels():
  with pytest.raises(errors.UserError, match="two channels"):
    models.create(
      "ViT-XS_4", num_classes=3, norm="Center", hidden_size=1, num_heads=1
    )


def test_calibrated_cal_has_mean_0_and_variance_1():
  start = pointwise.Cal(D).init(jax.random.key(0), X, False)
  y, found = calibrate(pointwise.Cal(D), start, X)
  np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-6)
  np.testing.assert_allclose(y.var(), 1, rtol=1e-5)
  mean = X.mean((0, 1))
  np.testing.assert_allclose(found["batch_stats"]["init_mean"], mean, rtol=1e-6)
  alpha = 1 / (X - mean).std()
  np.testing.assert_allclose(found["params"]["alpha"], [alpha], rtol=1e-5)


def test_calibration_averages_over_batches():
  start = pointwise.Cal(D).init(jax.random.key(0), X, False)
  _, found = calibrate(pointwise.Cal(D), start, X, X + 3, X - 6)
  mean = X.mean((0, 1)) - 1
  np.testing.assert_allclose(found["batch_stats"]["init_mean"], mean, atol=1e-5)
  # Deviations from the running mean at each batch.
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
    dropout_rate=0.0,
    **trees.TINY,
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


@pytest.mark.parametrize(
  "norm, numbers",
  [
    ("Cal", {}),
    ("BN", {}),
    ("Linear", {}),
    ("Rescale", {"count": 3}),
    ("Rescale", {"count": 8}),
    ("Center", {}),
    ("TaperLN", {"faded": 2**16}),
    ("TaperRMS", {"faded": 2**16}),
    ("PRepBN", {"faded": 2**16}),
  ],
)
def test_as_linear_equals_the_norm_in_evaluation(norm, numbers):
  Norm, found = norms.NORMS[norm], variables(norm)
  stats = found.get("batch_stats", {})
  stats = stats | {k: np.int32(n) for k, n in numbers.items()}
  if "faded" in numbers:
    with pytest.raises(ValueError, match="folds only"):
      unfinished = stats | {"faded": np.int32(2**16 - 1)}
      Norm.as_linear(found["params"], unfinished, 0.5)
  factor, shift = Norm.as_linear(found["params"], stats, 0.5)
  options = base.Options(epsilon=0.5)
  y = Norm(D, options=options).apply({**found, "batch_stats": stats}, X, False)
  x = X - X.mean(-1, keepdims=True) if Norm.CENTERED else X
  np.testing.assert_allclose(factor * x + shift, y, rtol=1e-5, atol=1e-5)


def test_foldable_norms():
  foldable = {
    name
    for name, Norm in norms.NORMS.items()
    if issubclass(Norm, traits.Foldable)
  }
  gradual = {"Fade", "TaperLN", "TaperRMS", "PRepBN"}
  assert foldable == {
    *("Rescale", "Cal", "Linear", "Center", "BN", "BN2"),
    *gradual,
  }
