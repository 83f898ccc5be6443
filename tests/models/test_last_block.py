"""The last block computes only the class token if that is sufficient."""

import functools

import jax
import norm_sets
import numpy as np
import pytest

from rescalevit_jax import models
from rescalevit_jax.models.norms import rescale
from rescalevit_jax.models.norms import traits

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3))
IMAGES = IMAGES.astype(np.float32)


def tiny(**arguments):
  return models.create(
    "ViT-XS_2",
    num_classes=3,
    image_size=8,
    hidden_size=32,
    mlp_dim=64,
    **{"dropout_rate": 0.3, "num_layers": 2, **arguments},
  )


def loss_and_gradient(model, variables, *collections):
  """Return loss, new statistics and gradient in training mode."""

  def loss(params):
    logits, new = model.apply(
      {**variables, "params": params},
      IMAGES,
      train=True,
      mutable=["batch_stats", *collections],
      rngs={"dropout": jax.random.key(1)},
    )
    return (logits**2).sum(), new.get("batch_stats", {})

  found = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return found(variables["params"])


@functools.cache
def trained(model):
  init = jax.jit(model.init)
  variables = {"batch_stats": {}, **init(jax.random.key(0), IMAGES)}
  apply = jax.jit(
    lambda x: model.apply(
      x,
      IMAGES,
      True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(0)},
    )[1]
  )
  if variables["batch_stats"]:
    for _ in range(rescale.Rescale.CALIBRATION_BATCHES):
      variables |= apply(variables)
  return variables


def assert_close(found, want):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5),
    found,
    want,
  )


@pytest.mark.parametrize(
  "norm", norm_sets.most_slow("LN", "BN", "GN", "Rescale", "Cal")
)
def test_training_equals_training_with_all_tokens(norm, remat=False):
  model = tiny(norm=norm, remat=remat, num_layers=1)
  variables = trained(tiny(norm=norm, num_layers=1))
  # Captured intermediates contain all tokens.
  want = loss_and_gradient(model, variables, "intermediates")
  assert_close(loss_and_gradient(model, variables, traits.SETTLED), want)


@pytest.mark.slow
def test_training_with_remat_equals_training_with_all_tokens():
  test_training_equals_training_with_all_tokens("Rescale", remat=True)


@pytest.mark.parametrize("norm", norm_sets.DIFFERENT)
def test_evaluation_equals_evaluation_with_all_tokens(norm):
  model = tiny(norm=norm, num_layers=1)
  variables = trained(model)
  found = jax.jit(model.apply)(variables, IMAGES)
  want, seen = jax.jit(
    lambda x: model.apply(x, IMAGES, mutable=["intermediates"])
  )(variables)
  assert_close(found, want)
  maps = jax.tree.leaves(seen)
  assert [x.shape for x in maps] == [(4, 4, 17, 17)]


def rows_of_the_last_mlp(norm, train, pool="cls", collections=()):
  model = tiny(norm=norm, pool=pool)
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  text = str(
    jax.make_jaxpr(
      lambda variables: model.apply(
        variables,
        IMAGES,
        train,
        mutable=["batch_stats", *collections],
        rngs={"dropout": jax.random.key(0)},
      )
    )(variables)
  )
  return {
    tokens: text.count(f"f32[{4 * tokens},64] = dot_general")
    for tokens in (1, 17)
  }


@pytest.mark.parametrize(
  "norm, train, collections, shortened",
  [
    ("LN", True, (), True),
    ("LN", False, (), True),
    ("BN", True, (), False),  # The statistics need all tokens.
    ("BN", False, (), True),
    ("GN", False, (), False),
    ("Rescale", True, (), False),  # It may still calibrate.
    ("Rescale", True, (traits.SETTLED,), True),
    ("Cal", True, (), True),
    ("Cal", True, ("calibration", "params"), False),
    ("Fade", True, (), False),
    ("LN", True, ("intermediates",), False),
  ],
)
def test_one_token_is_computed_if_sufficient(
  norm, train, collections, shortened
):
  found = rows_of_the_last_mlp(norm, train, collections=collections)
  assert found == ({1: 1, 17: 1} if shortened else {1: 0, 17: 2})


def test_a_mean_of_patches_needs_all_tokens():
  assert rows_of_the_last_mlp("LN", True, "gap") == {1: 0, 17: 2}


def test_a_pass_with_all_collections_mutable_calibrates():
  model = tiny(norm="Rescale", num_layers=1)
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  rngs = {"dropout": jax.random.key(0)}
  _, new = model.apply(variables, IMAGES, True, mutable=True, rngs=rngs)
  block = new["batch_stats"]["Transformer"]["encoderblock_0"]
  assert block["Rescale_0"]["count"] == 1


def test_settled_rescale_keeps_its_statistics():
  model = tiny(norm="Rescale", num_layers=1)
  variables = trained(model)
  (_, statistics), _ = loss_and_gradient(model, variables, traits.SETTLED)
  jax.tree.map(
    np.testing.assert_array_equal, statistics, variables["batch_stats"]
  )
