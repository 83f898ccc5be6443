"""TaperNorm and PRepBN: a norm at the start, a linear map at the end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

from rescalevit_jax import models
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import prepbn
from rescalevit_jax.models.norms import rms_norm
from rescalevit_jax.models.norms import taper
from rescalevit_jax.models.norms import traits
from rescalevit_jax.training import train_step

D = 6
X = np.random.default_rng(0).normal(0.5, 2.0, (3, 4, D)).astype(np.float32)
SCALE = np.linspace(0.5, 1.5, D).astype(np.float32)
BIAS = np.linspace(-0.3, 0.4, D).astype(np.float32)


def start(module):
  found = module.init(jax.random.key(0), X, True)
  params = found["params"] | {"scale": SCALE}
  if "bias" in params:
    params |= {"bias": BIAS}
  return {**found, "params": params}


def passes(module, found, *batches):
  for x in batches:
    _, new = module.apply(found, x, True, mutable=["batch_stats"])
    found = {**found, **new}
  return found["batch_stats"]


@pytest.mark.parametrize(
  "Norm, Before",
  [
    (taper.TaperLN, layer_norm.LayerNorm),
    (taper.TaperRMS, rms_norm.RMSNorm),
    (prepbn.PRepBN, layer_norm.LayerNorm),
  ],
)
def test_without_a_schedule_the_norm_is_unchanged(Norm, Before):
  found = start(Norm(D))
  names = ("scale", "bias") if Before is layer_norm.LayerNorm else ("scale",)
  params = {name: found["params"][name] for name in names}
  want = Before(D).apply({"params": params}, X, False)
  stats = passes(Norm(D), found, X, X)
  assert (stats["count"], stats["faded"]) == (2, 0)
  for statistics in (found["batch_stats"], stats):
    y = Norm(D).apply({**found, "batch_stats": statistics}, X, False)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("Norm", [taper.TaperLN, taper.TaperRMS])
def test_taper_statistics_by_hand(Norm):
  module = Norm(D, schedule=taper.Schedule(2, 4, 1.0))
  found, batches = start(module), [X, 2 * X - 1]
  stats = passes(module, found, *batches)
  dividends, divisors, sigmas = [], [], []
  for x in batches:
    z = x.astype(np.float64)
    if Norm.CENTERED:
      z = z - z.mean(-1, keepdims=True)
    sigma = np.sqrt((z**2).mean(-1) + 1e-6)
    energy = ((SCALE * z) ** 2).sum(-1)
    dividends.append((energy / sigma).mean())
    divisors.append(energy.mean())
    sigmas.append(sigma.mean())
  for name, want in (
    ("dividend", dividends),
    ("divisor", divisors),
    ("target", sigmas),
  ):
    np.testing.assert_allclose(stats[name], np.mean(want), rtol=1e-5)
  np.testing.assert_array_equal(stats["gain"], SCALE)
  assert stats["faded"] == 0
  # From here the gain is independent of the scale.
  moved = {**found, "params": found["params"] | {"scale": 3 * SCALE}}
  half = passes(module, {**moved, "batch_stats": stats}, X)
  assert half["faded"] == gradual.FULL / 2
  moved["params"] = found["params"] | {"scale": 5 * SCALE}
  later = passes(module, {**moved, "batch_stats": half}, 5 * X, X)
  assert later["faded"] == gradual.FULL
  for name in ("gain", "dividend", "divisor", "target"):
    np.testing.assert_array_equal(later[name], half[name])
  # At the end it is linear up to the bias.
  end = {**moved, "batch_stats": later}
  y = [module.apply(end, x, False) for x in (X, 3 * X, 0 * X)]
  np.testing.assert_allclose(y[1] - y[2], 3 * (y[0] - y[2]), rtol=1e-4)


@pytest.mark.parametrize("tokens", [(0, 1), (1, None), (0, None)])
def test_anchor_loss_by_hand(tokens):
  """The loss covers only tokens that the head uses."""
  schedules = taper.Schedule(0, 4, 1.0, True, 0.25, tokens)
  assert schedules.at_site(1, 3) == taper.Schedule(0, 4, 1.0)
  final = schedules.at_site(2, 3)
  assert final == schedules
  kept = dataclasses.replace(schedules, final=False).at_site(2, 3)
  assert kept.anchor == 0 and kept.faded(jnp.int32(10**9)) == 0
  module = taper.TaperLN(D, schedule=final)
  found = start(module)
  for faded, active in ((0, 0), (9, 1)):
    stats = {**found["batch_stats"], "faded": faded, "target": 1.5}
    _, new = module.apply(
      {**found, "batch_stats": stats},
      X,
      True,
      mutable=["batch_stats", "losses"],
    )
    (loss,) = jax.tree.leaves(new[traits.LOSSES])
    sigma = np.sqrt(X[:, slice(*tokens)].var(-1) + 1e-6)
    if not active:
      target = new["batch_stats"]["target"]
      np.testing.assert_allclose(target, sigma.mean(), rtol=1e-5)
    want = active * 0.25 * ((sigma - 1.5) ** 2).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_training_loss_contains_the_anchor_loss():
  def tiny(anchor):
    return models.create(
      "ViT-B_16",
      num_classes=3,
      image_size=8,
      norm="TaperLN",
      dropout_rate=0.0,
      norm_schedule=taper.Schedule(0, 4, 1.0, True, anchor),
      **trees.TINY,
    )

  images = np.random.default_rng(1).uniform(-1, 1, (4, 8, 8, 3))
  found = tiny(0.0).init(jax.random.key(0), images)
  stats = jax.tree.map(
    lambda x: x + 9 if x.dtype == jnp.int32 else x, found["batch_stats"]
  )

  def loss(params, anchor):
    return train_step.loss_fn(
      params,
      stats,
      images,
      np.arange(4) % 3,
      jax.random.key(0),
      model=tiny(anchor),
    )[0]

  gradient = jax.value_and_grad(loss)
  without, with_anchor = (gradient(found["params"], x) for x in (0.0, 0.5))
  assert with_anchor[0] > without[0]
  kernels = [g["embedding"]["kernel"] for _, g in (without, with_anchor)]
  assert np.abs(kernels[1] - kernels[0]).max() > 1e-6


def test_prepbn_by_hand():
  module = prepbn.PRepBN(
    D,
    options=base.Options(momentum=0.0),
    schedule=gradual.Schedule(0, 4, 1.0),
  )
  found = start(module)
  params = found["params"]
  params |= {"bn_scale": 2 * SCALE, "bn_bias": -BIAS, "eta": jnp.array([0.3])}
  x = X.astype(np.float64)
  z = x - x.mean(-1, keepdims=True)
  layer = SCALE * z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) + BIAS
  mean, var = x.mean((0, 1)), x.var((0, 1))
  for count, share in enumerate((0, 0.25, 0.5, 0.75, 1, 1)):
    for train in (True, False):
      if train:
        y, new = module.apply(found, X, True, mutable=["batch_stats"])
        variance = var
      else:
        y = module.apply(found, X, False)
        mean, variance = (found["batch_stats"][k] for k in ("mean", "var"))
      batch = 2 * SCALE * (x - mean) / np.sqrt(variance + 1e-6) - BIAS
      want = (1 - share) * layer + share * (batch + 0.3 * x)
      np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    found = {**found, **new}
    assert found["batch_stats"]["count"] == count + 1
    mean = x.mean((0, 1))


def test_all_sites_fade_together():
  together = gradual.Schedule(10, 20, 1.0)
  assert {together.at_site(site, 5) for site in range(5)} == {together}
