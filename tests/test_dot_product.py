"""Attention, dropout and GELU as the models compute them."""

import jax
from jax.extend import random as extend_random
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from rescalevit_jax import accelerator
from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import experiment
from rescalevit_jax import models
from rescalevit_jax.models import branches
from rescalevit_jax.models.ops import attention
from rescalevit_jax.models.ops import dropout


def draw(shape, seed, dtype=np.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def plain_attention(query, key, value):
  """As the equation has it, in float32."""
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


@pytest.mark.parametrize("dtype, atol", [("float32", 3e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_and_its_gradient(dtype, atol, scale):
  arrays = [draw((2, 7, 3, 4), i, dtype) for i in range(3)]
  arrays[0] *= scale
  weights = draw((2, 7, 3, 4), 4)

  def loss(attend, query, key, value):
    return (attend(query, key, value).astype(jnp.float32) * weights).sum()

  def ours(*arrays):
    return attention.attend(*arrays, "xla")

  np.testing.assert_allclose(
    ours(*arrays).astype(np.float32), plain_attention(*arrays), atol=atol
  )
  found, expected = (
    jax.grad(loss, (1, 2, 3))(attend, *arrays)
    for attend in (ours, plain_attention)
  )
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == dtype
    bound = atol * max(1.0, float(jnp.abs(y).max()))
    np.testing.assert_allclose(
      x.astype(np.float32), y.astype(np.float32), atol=bound
    )


def test_attention_does_not_overflow():
  x = jnp.full((1, 3, 1, 4), 1e4)
  value = draw((1, 3, 1, 4), 0)
  y = attention.attend(x, x, value, "xla")
  mean = jnp.broadcast_to(value.mean(1, keepdims=True), y.shape)
  np.testing.assert_allclose(y, mean, atol=1e-6)


def test_probabilities_are_those_of_the_result():
  query, key, value = (draw((2, 5, 2, 3), i) for i in range(3))
  maps = attention.probabilities(query, key)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
  y = jnp.einsum("bhqk,bkhd->bqhd", maps, value)
  np.testing.assert_allclose(
    attention.attend(query, key, value, "xla"), y, atol=1e-6
  )


def test_second_derivatives():
  """Forward over reverse, as sharpness needs it."""
  arrays = [draw((1, 4, 1, 2), i) for i in range(3)]

  def product(attend):
    gradient = jax.grad(lambda q: jnp.sin(attend(q, *arrays[1:])).sum())
    return jax.jvp(gradient, (arrays[0],), (draw((1, 4, 1, 2), 9),))[1]

  found = product(lambda *x: attention.attend(*x, "xla"))
  np.testing.assert_allclose(found, product(plain_attention), atol=2e-5)


@pytest.mark.parametrize(
  "device, dtype, head_dim, expected",
  [
    (accelerator.Accelerator("gpu", (9, 0)), "bfloat16", 64, "cudnn"),
    (accelerator.Accelerator("gpu", (10, 0)), "bfloat16", 64, "cudnn"),
    (accelerator.Accelerator("gpu", (8, 0)), "bfloat16", 64, "xla"),
    (accelerator.Accelerator("gpu", (9, 0)), "float32", 64, "xla"),
    (accelerator.Accelerator("gpu", (9, 0)), "bfloat16", 20, "xla"),
    (accelerator.Accelerator("cpu"), "bfloat16", 64, "xla"),
  ],
)
def test_auto(device, dtype, head_dim, expected, monkeypatch):
  monkeypatch.setattr(accelerator, "current", lambda: device)
  assert attention.choose(jnp.dtype(dtype), head_dim) == expected


@pytest.mark.parametrize(
  "backend, dtype", [("gpu", "float32"), ("cpu", "bfloat16")]
)
def test_cudnn_needs_a_gpu_and_bfloat16(backend, dtype, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with pytest.raises(errors.UserError, match=f"{backend} and {dtype}"):
    models.create("ViT-XS_4", num_classes=2, attention="cudnn", dtype=dtype)


def test_a_deterministic_run_does_without_cudnn(monkeypatch):
  monkeypatch.setattr(attention, "choose", lambda dtype, head_dim: "cudnn")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  config = config_lib.default()
  assert experiment.create_model(config, 2).attention == "cudnn"
  config.deterministic = True
  assert experiment.create_model(config, 2).attention == "xla"
  config.model.attention = "cudnn"
  with pytest.raises(errors.UserError, match="not deterministic"):
    experiment.create_model(config, 2)


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
def test_a_bfloat16_model_trains_on_this_machine(norm):
  images = draw((4, 32, 32, 3), 0)
  gradients = []
  for dtype in ("float32", "bfloat16"):
    model = models.create(
      "ViT-XS_4",
      num_classes=3,
      norm=norm,
      image_size=32,
      num_layers=2,
      dtype=dtype,
    )
    variables = model.init(jax.random.key(0), images)

    def loss(params, model=model, variables=variables):
      variables = {**variables, "params": params}
      return jnp.square(model.apply(variables, images)).sum()

    found = jax.jit(jax.grad(loss))(variables["params"])
    leaves = jax.tree.leaves(found)
    gradients.append(np.concatenate([np.ravel(x) for x in leaves]))
  exact, rough = gradients
  assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
def test_remat_changes_memory_only(norm):
  images = draw((2, 8, 8, 3), 0)

  def gradient(remat):
    model = models.create(
      "ViT-XS_4",
      num_classes=3,
      norm=norm,
      image_size=8,
      num_layers=1,
      remat=remat,
    )
    variables = model.init(jax.random.key(0), images)

    def loss(params):
      logits, new = model.apply(
        {**variables, "params": params},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
      )
      return jnp.square(logits).sum(), new

    step = jax.jit(jax.grad(loss, has_aux=True))
    lowered = step.lower(variables["params"])
    return step(variables["params"]), lowered.as_text()

  (plain, text), (again, saved) = gradient(False), gradient(True)

  # jax 0.12 rounds what it computes again in other places.
  def assert_close(x, y):
    scale = max(1, np.abs(x).max())
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * scale)

  jax.tree.map(assert_close, plain, again)
  assert saved.count("stablehlo.exponential") > text.count(
    "stablehlo.exponential"
  )


# Dropout.


def test_threefry_is_that_of_jax():
  key = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
  counters = np.random.default_rng(0).integers(0, 2**32, (2, 100), np.uint32)
  found = dropout.threefry2x32(*key, *map(jnp.asarray, counters))
  expected = extend_random.threefry_2x32(tuple(key), counters.ravel())
  np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("features", [1, 3, 64, 258])
def test_masks_are_as_frequent_as_asked_for_and_independent(features):
  rows = 2**18 // features
  kept = 6 * 2**13  # Of 2^16: 3/4.
  mask = np.asarray(
    dropout.random_mask(jax.random.key(7), (2, rows, features), kept)
  )
  assert mask.shape == (2, rows, features) and mask.dtype == bool
  deviation = (0.75 * 0.25 / mask.size) ** 0.5
  assert abs(mask.mean() - 0.75) < 4 * deviation
  for axis in range(3):  # Neighbours, and the two images.
    size = mask.shape[axis]
    if size == 1:
      continue
    left, right = (mask.take(range(i, size - 1 + i), axis) for i in (0, 1))
    covariance = (left & right).mean() - left.mean() * right.mean()
    assert abs(covariance) < 5 * 0.75 * 0.25 / left.size**0.5


def test_the_four_quarters_of_a_row_are_independent():
  mask = np.asarray(
    dropout.random_mask(jax.random.key(3), (50_000, 8), 2**15)
  ).reshape(-1, 4, 2)
  for i in range(4):
    for j in range(i):
      same = (mask[:, i] == mask[:, j]).mean()
      assert abs(same - 0.5) < 5 * 0.5 / 100_000**0.5


def test_masks_depend_on_the_key_alone():
  a, b, c = (
    np.asarray(dropout.random_mask(jax.random.key(k), (3, 5, 8), 2**15))
    for k in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_dropout_keeps_the_mean():
  layer = dropout.Dropout(0.1)
  x = jnp.ones((100, 100, 40), jnp.bfloat16)
  y = layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)})
  assert y.dtype == x.dtype
  values = np.unique(np.asarray(y, np.float32))
  assert values[0] == 0 and values[1] == pytest.approx(1 / 0.9, rel=4e-3)
  assert np.asarray(y, np.float32).mean() == pytest.approx(1, abs=5e-3)
  np.testing.assert_array_equal(layer.apply({}, x, False), x)
  # Almost all, by a key of another kind.
  rngs = {"dropout": jax.random.key(0, impl="rbg")}
  y = dropout.Dropout(0.9999999).apply({}, x, True, rngs=rngs)
  assert np.isfinite(np.asarray(y, np.float32)).all() and not y.all()
  # A rate that rounds to nothing needs no key.
  np.testing.assert_array_equal(dropout.Dropout(1e-6).apply({}, x, True), x)


def test_gelu_is_exact():
  x = np.linspace(-12, 12, 10_001, dtype=np.float32)
  exact = x * special.ndtr(x.astype(np.float64))
  np.testing.assert_allclose(
    branches.gelu_erf(jnp.asarray(x)), exact, atol=2e-6
  )
  rough = branches.gelu_erf(jnp.asarray(x, jnp.bfloat16))
  assert rough.dtype == jnp.bfloat16
  given = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  np.testing.assert_allclose(
    np.asarray(rough, np.float64),
    given * special.ndtr(given),
    rtol=2**-8,
    atol=2e-6,
  )
