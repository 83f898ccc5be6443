"""Attention, dropout and GELU as the models compute them."""

import functools
import json
import re

import jax
from jax.extend import random as extend_random
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.models import vit
from rescalevit_jax.models.ops import attention
from rescalevit_jax.models.ops import cudnn
from rescalevit_jax.models.ops import dropout
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.training import experiment


def draw(shape, seed, dtype=np.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def plain_attention(query, key, value, cap=None):
  """Return attention by its equation, in float32."""
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if cap:
      scores = cap * jnp.tanh(scores / cap)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


@pytest.mark.parametrize("dtype, atol", [("float32", 3e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("scale, cap", [(1.0, None), (30.0, None), (30.0, 2.0)])
def test_attention_and_gradient_equal_plain_attention(dtype, atol, scale, cap):
  arrays = [draw((2, 7, 3, 4), i, dtype) for i in range(3)]
  arrays[0] *= scale
  weights = draw((2, 7, 3, 4), 4)

  def loss(attend, query, key, value):
    return (attend(query, key, value).astype(jnp.float32) * weights).sum()

  def ours(*arrays):
    return attention.attend(*arrays, "xla", cap)

  def plain(*arrays):
    return plain_attention(*arrays, cap)

  np.testing.assert_allclose(
    ours(*arrays).astype(np.float32), plain(*arrays), atol=atol
  )
  found, expected = (
    jax.grad(loss, (1, 2, 3))(attend, *arrays) for attend in (ours, plain)
  )
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == dtype
    bound = atol * max(1.0, float(jnp.abs(y).max()))
    np.testing.assert_allclose(
      x.astype(np.float32), y.astype(np.float32), atol=bound
    )


@pytest.mark.parametrize("queries", [1, 7, 8])
def test_padding_tokens_for_a_gpu_does_not_change_attention(queries):
  arrays = [draw((2, n, 3, 4), i) for i, n in enumerate((queries, 7, 7))]
  if queries == 8:
    arrays = [draw((2, 8, 3, 4), i) for i in range(3)]
  weights = draw((2, queries, 3, 4), 4)

  def loss(attend, *arrays):
    return (attend(*arrays) * weights).sum()

  def both(attend):
    return jax.value_and_grad(loss, (1, 2, 3))(attend, *arrays)

  with on("gpu", (7, 5)):
    found = both(lambda *x: attention.attend(*x, "xla"))
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(both(plain_attention)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_float16_attention_does_not_overflow():
  x, value = jnp.zeros((2, 600, 1, 8)), jnp.full((2, 600, 1, 8), 400.0)
  found = attention.attend(
    *(x.astype(jnp.float16) for x in (x, x, value)), "xla"
  )
  np.testing.assert_allclose(found, value, rtol=1e-3)


def test_attention_does_not_overflow():
  x = jnp.full((1, 3, 1, 4), 1e4)
  value = draw((1, 3, 1, 4), 0)
  y = attention.attend(x, x, value, "xla")
  mean = jnp.broadcast_to(value.mean(1, keepdims=True), y.shape)
  np.testing.assert_allclose(y, mean, atol=1e-6)


def test_probabilities_times_values_give_the_output():
  query, key, value = (draw((2, 5, 2, 3), i) for i in range(3))
  maps = attention.probabilities(query, key)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
  y = jnp.einsum("bhqk,bkhd->bqhd", maps, value)
  np.testing.assert_allclose(
    attention.attend(query, key, value, "xla"), y, atol=1e-6
  )


def test_second_derivatives_equal_plain_attention():
  """Test forward-over-reverse derivatives, which sharpness needs."""
  arrays = [draw((1, 4, 1, 2), i) for i in range(3)]

  def product(attend):
    gradient = jax.grad(lambda q: jnp.sin(attend(q, *arrays[1:])).sum())
    return jax.jvp(gradient, (arrays[0],), (draw((1, 4, 1, 2), 9),))[1]

  found = product(lambda *x: attention.attend(*x, "xla"))
  np.testing.assert_allclose(found, product(plain_attention), atol=2e-5)


GPUS = {
  "Turing": (7, 5),
  "Ampere": (8, 0),
  "RTX 3090": (8, 6),
  "Ada": (8, 9),
  "Hopper": (9, 0),
  "Blackwell": (10, 0),
}


def on(platform, capability=(0, 0)):
  return accelerator.compiling_for(
    accelerator.Accelerator(platform, capability)
  )


def auto(dtype, head_dim):
  """Return the attention of a model that selects it."""
  sizes = {"hidden_size": 2 * head_dim, "num_heads": 2}
  model = models.create("ViT-B_16", num_classes=2, dtype=dtype, **sizes)
  return model.config.attention


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", GPUS)
def test_auto_selects_cudnn_on_ampere_and_newer(name, dtype):
  for head_dim in (32, 64, 80, 128):
    with on("gpu", GPUS[name]):
      problem = attention.cudnn_problem(jnp.dtype(dtype), head_dim)
      chosen = auto(dtype, head_dim)
    fused = name != "Turing" and dtype != "float32"
    assert chosen == ("cudnn" if fused else "xla")
    if fused:
      assert problem is None
    elif dtype == "float32":
      assert "needs bfloat16" in problem
    else:
      assert "8.0 (Ampere) or newer, not 7.5" in problem


@pytest.mark.parametrize(
  "platform, head_dim, reason",
  [
    ("gpu", 20, "multiple of 8, not 20"),
    ("gpu", 160, "at most 128 channels"),
    ("cpu", 64, "not this CPU"),
    ("tpu", 64, "not this TPU"),
  ],
)
def test_auto_selects_xla_if_cudnn_is_unsupported(platform, head_dim, reason):
  with on(platform, (9, 0)):
    problem = attention.cudnn_problem(jnp.dtype("bfloat16"), head_dim)
    assert auto("bfloat16", head_dim) == "xla" and reason in problem


def test_logit_cap_disables_cudnn():
  sizes = {"hidden_size": 128, "num_heads": 2, "logit_cap": 5.0}
  create = functools.partial(
    models.create, "ViT-B_16", num_classes=2, dtype="bfloat16", **sizes
  )
  with on("gpu", GPUS["Hopper"]):
    assert create().config.attention == "xla"
    with pytest.raises(errors.UserError, match="model.logit_cap"):
      create(attention="cudnn")


def lowered_cudnn(tokens, head_dim, dtype, attend):
  """Return targets and configs of the custom calls of attention's gradient."""
  x = jax.ShapeDtypeStruct((2, tokens, 3, head_dim), dtype)

  def loss(*arrays):
    return attend(*arrays).astype(jnp.float32).sum()

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  text = step.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
  calls = re.findall(
    r'custom_call @(__cudnn\$\w+)\(.*?backend_config = "(.*?)"[,}]', text
  )
  return {
    name: json.loads(config.replace("\\22", '"')) for name, config in calls
  }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("tokens", [50, 65, 197, 257, 577])
def test_cudnn_supports_any_number_of_tokens_in_training(
  tokens, head_dim, dtype
):
  found = lowered_cudnn(tokens, head_dim, dtype, cudnn.attend)
  assert set(found) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_calls_equal_jax_calls(dtype, monkeypatch):
  # Private, because the public function checks local devices. A failure means
  # that JAX has changed its custom call, and `ops.cudnn` may have to change.
  from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

  monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(
    jax_cudnn, "is_cuda_compute_capability_equal", lambda _: False
  )

  def of_jax(*arrays):
    return jax.nn.dot_product_attention(*arrays, implementation="cudnn")

  def without_defaults(config):
    """Remove fields with default values, and the seed if dropout is 0."""
    if not isinstance(config, dict):
      return config
    config = {k: without_defaults(v) for k, v in config.items() if k != "seed"}
    nothing = (None, "0", [], {}, False, "PRIMITIVE_TYPE_INVALID")
    return {k: v for k, v in config.items() if v not in nothing}

  found, want = (
    lowered_cudnn(50, 64, dtype, attend) for attend in (cudnn.attend, of_jax)
  )
  assert without_defaults(found) == without_defaults(want)


@pytest.mark.parametrize(
  "platform, dtype, reason",
  [
    ("gpu", "float32", "needs bfloat16 or float16, not float32"),
    ("cpu", "bfloat16", "needs an NVIDIA GPU, not this CPU"),
  ],
)
def test_unsupported_cudnn_is_rejected(platform, dtype, reason):
  with (
    on(platform, (9, 0)),
    pytest.raises(errors.UserError, match=f"attention: .*{reason}; choose"),
  ):
    models.create("ViT-XS_4", num_classes=2, attention="cudnn", dtype=dtype)


def test_deterministic_runs_do_not_use_cudnn(monkeypatch):
  monkeypatch.setattr(
    accelerator, "current", lambda: accelerator.Accelerator("gpu", (9, 0))
  )
  monkeypatch.setattr(accelerator, "platform", lambda: "gpu")
  config = config_lib.default()
  assert experiment.create_model(config, 2).config.attention == "cudnn"
  config.deterministic = True
  assert experiment.create_model(config, 2).config.attention == "xla"
  config.model.attention = "cudnn"
  with pytest.raises(errors.UserError, match="conflicts with deterministic"):
    experiment.create_model(config, 2)


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
def test_bfloat16_gradients_are_close_to_float32(norm):
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


def test_remat_recomputes_activations():
  images = draw((2, 8, 8, 3), 0)

  def exponentials(remat):
    model = models.create(
      "ViT-XS_4", num_classes=3, image_size=8, num_layers=1, remat=remat
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda x: model.apply(x, images).sum())
    text = jax.jit(gradient).lower(variables).as_text()
    return text.count("stablehlo.exponential")

  assert exponentials(True) > exponentials(False)


# Dropout.


def test_threefry_equals_jaxs():
  key = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
  counters = np.random.default_rng(0).integers(0, 2**32, (2, 100), np.uint32)
  found = dropout.threefry2x32(*key, *map(jnp.asarray, counters))
  expected = extend_random.threefry_2x32(tuple(key), counters.ravel())
  np.testing.assert_array_equal(np.concatenate(found), expected)


def mask_of(seed, shape, kept, index=0):
  key = dropout.step_key(jax.random.key(seed))
  return np.asarray(dropout.random_mask(key, index, shape, kept))


@pytest.mark.parametrize("features", [1, 3, 64, 258])
def test_masks_have_the_requested_rate_and_are_independent(features):
  rows = 2**15 // max(8, features)
  kept = 6 * 2**13  # 3/4 of 2^16.
  mask = mask_of(7, (32, rows, features), kept)
  assert mask.shape == (32, rows, features) and mask.dtype == bool
  deviation = (0.75 * 0.25 / mask.size) ** 0.5
  assert abs(mask.mean() - 0.75) < 4 * deviation
  for axis in range(3):  # Neighbors and the two images.
    size = mask.shape[axis]
    if size == 1:
      continue
    left, right = (mask.take(range(i, size - 1 + i), axis) for i in (0, 1))
    covariance = (left & right).mean() - left.mean() * right.mean()
    assert abs(covariance) < 5 * 0.75 * 0.25 / left.size**0.5


def test_bits_of_a_row_are_independent():
  mask = mask_of(3, (20_000, 64), 2**15)
  same = (2.0 * mask - 1).T @ (2.0 * mask - 1) / len(mask)
  np.testing.assert_allclose(same, np.eye(64), atol=5 / 20_000**0.5)


@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 258), (6, 1), (4, 3, 7)])
def test_packed_gpu_masks_equal_cpu_masks(shape):
  want = mask_of(5, shape, 2**15, index=7)
  with on("gpu", (9, 0)):
    found = mask_of(5, shape, 2**15, index=7)
  np.testing.assert_array_equal(found, want)


def test_an_element_is_a_quarter_of_a_threefry_block():
  key = dropout.step_key(jax.random.key(5))
  row, column = 1 * 2**14 + 2, 6
  counters = np.uint32([row, (7 << 20) + column])
  blocks = extend_random.threefry_2x32(tuple(key), counters)
  mask = mask_of(5, (2, 3, 64), 2**15, index=7)
  halves = [int(half) for x in blocks for half in (x & 0xFFFF, x >> 16)]
  found = [mask[1, 2, 16 * quarter + column] for quarter in range(4)]
  assert found == [half < 2**15 for half in halves]


def test_masks_depend_only_on_key_and_index():
  a, b, c = (mask_of(seed, (3, 5, 8), 2**15) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  assert (a != mask_of(0, (3, 5, 8), 2**15, index=1)).any()


def test_masks_do_not_depend_on_other_tokens_and_images():
  want = mask_of(0, (4, 7, 40), 2**15)
  np.testing.assert_array_equal(mask_of(0, (4, 1, 40), 2**15), want[:, :1])
  np.testing.assert_array_equal(mask_of(0, (2, 7, 40), 2**15), want[:2])


def test_dropout_keeps_the_mean():
  key = dropout.step_key(jax.random.key(0))
  x = jnp.ones((100, 100, 40), jnp.bfloat16)
  y = dropout.drop(x, key, 0, 0.1)
  assert y.dtype == x.dtype
  values = np.unique(np.asarray(y, np.float32))
  assert values[0] == 0 and values[1] == pytest.approx(1 / 0.9, rel=4e-3)
  assert np.asarray(y, np.float32).mean() == pytest.approx(1, abs=5e-3)
  assert dropout.drop(x, None, 0, 0.1) is x
  # Almost all elements are dropped, with another type of key.
  key = dropout.step_key(jax.random.key(0, impl="rbg"))
  y = dropout.drop(x, key, 0, 0.9999999)
  assert np.isfinite(np.asarray(y, np.float32)).all() and not y.all()
  assert dropout.drop(x, key, 0, 1e-6) is x  # The rate rounds to 0.


def test_whole_images_are_dropped():
  key = dropout.step_key(jax.random.key(0))
  y = np.asarray(dropout.drop(jnp.ones((64, 3, 5)), key, 0, 0.5, whole=True))
  assert set(y.min((1, 2))) == {0, 2} and (y.min((1, 2)) == y.max((1, 2))).all()


def test_gelu_is_accurate():
  x = np.linspace(-12, 12, 10_001, dtype=np.float32)
  exact = x * special.ndtr(x.astype(np.float64))
  np.testing.assert_allclose(vit.gelu(jnp.asarray(x), "erf"), exact, atol=2e-6)
  rough = vit.gelu(jnp.asarray(x, jnp.bfloat16), "erf")
  assert rough.dtype == jnp.bfloat16
  given = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  np.testing.assert_allclose(
    np.asarray(rough, np.float64),
    given * special.ndtr(given),
    rtol=2**-8,
    atol=2e-6,
  )


def test_too_many_tokens_for_dropout_are_a_one_line_error():
  key = jnp.zeros(2, jnp.uint32)
  with pytest.raises(errors.UserError, match="16385 tokens are more"):
    dropout.random_mask(key, 0, (1, 2**14 + 1, 8), 2**15)
