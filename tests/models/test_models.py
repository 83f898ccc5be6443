"""Models: names, errors, precision, modes and norms."""

import functools
import itertools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import norm_sets
import numpy as np
import optax
import pytest

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import plots
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit
from rescalevit_jax.models import vit_config
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import group_norm
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import rescale
from rescalevit_jax.models.ops import dropout
from rescalevit_jax.optim import optimizers
from rescalevit_jax.pretrained import detect
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib

NORMS = norm_sets.DIFFERENT
TINY = dict(
  num_classes=3,
  image_size=8,
  patch_size=4,
  hidden_size=16,
  mlp_dim=32,
  num_heads=2,
  num_layers=2,
)


def tiny(**kwargs):
  return models.create("ViT-B_16", **{**TINY, **kwargs})


def images(batch=4):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(-1, 1, (batch, 8, 8, 3)), jnp.float32)


def random_variables(model):
  """Return random parameters and fresh statistics, without compiling."""
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), images(1)
  )
  rng = np.random.default_rng(0)

  def fill(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.startswith("batch_stats") and not name.endswith("vector"):
      one = name.endswith(("var", "gain", "dividend", "divisor"))
      return jnp.full(x.shape, one, x.dtype)
    mean = name.endswith("scale")
    return jnp.asarray(mean + 0.2 * rng.standard_normal(x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def variables_of(norm):
  return random_variables(tiny(norm=norm))


def train(model, variables, seed=0):
  """Return the logits and the new statistics of a training pass."""
  return model.apply(
    variables,
    images(),
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": jax.random.key(seed)},
  )


def flatten(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


# create().


@pytest.mark.parametrize(
  "kwargs, expected",
  [
    (dict(name="ViT-B16"), "model_name: unknown 'ViT-B16'; did you mean.*B_16"),
    (dict(name="vit-l_32"), "model_name: unknown 'vit-l_32'; .*ViT-L_32"),
    (dict(norm="Rescal"), "norm: unknown 'Rescal'; did you mean Rescale"),
    (dict(norm="ln"), "norm: unknown 'ln'; did you mean LN"),
    (dict(gelu="tan"), "gelu: unknown 'tan'; did you mean tanh"),
    (dict(gelu=True), "gelu: unknown True; .*erf, tanh"),
    (dict(residual="rescal"), "residual: unknown 'rescal'; .*rescale"),
    (dict(residual_c=0.0), "residual_c: 0.0 is not > 0"),
    (dict(dropout_rate=1.5), r"dropout_rate: 1.5 is not in \[0, 1\)"),
    (dict(dropout_rate=None), r"dropout_rate: None is not in \[0, 1\)"),
    (dict(bn_momentum=-0.1), r"bn_momentum: -0.1 is not in \[0, 1\)"),
    (dict(num_classes=0), "num_classes: 0 is not > 0"),
    (dict(representation_size=0), "representation_size: 0 is not > 0"),
    (dict(pool="mean"), "pool: unknown 'mean'; .*cls, gap"),
    (dict(init="googel"), "init: unknown 'googel'; did you mean google"),
    (dict(dtype="float61"), "dtype: unknown 'float61'; did you mean .*float16"),
    (dict(hiden_size=16), "unknown argument 'hiden_size'; .*hidden_size"),
    (dict(image_size=30), "image_size: 30 .*patch size 4"),
    (dict(hidden_size=18, num_heads=4), "hidden_size: 18 .*4 heads"),
    (dict(hidden_size=18, norm="GN"), "hidden_size: 18 .*4 groups"),
  ],
)
def test_invalid_arguments_raise_one_line_errors(kwargs, expected):
  with pytest.raises(errors.UserError, match=expected) as error:
    tiny(**kwargs) if "name" not in kwargs else models.create(
      **{**TINY, **kwargs}
    )
  assert "\n" not in str(error.value)


def test_size_of_none_keeps_the_variants_value():
  model = models.create("ViT-S_16", num_classes=3, hidden_size=None)
  want = vit_config.VARIANTS["ViT-S_16"]["hidden_size"]
  assert model.config.hidden_size == want


def test_documentation_example_works():
  images = jnp.zeros((2, 24, 24, 3))
  key = jax.random.key(1)
  model = models.create(
    "ViT-B_16", num_classes=10, norm="Rescale", image_size=224
  )
  assert isinstance(model, flax.linen.Module)
  model = models.create(
    "ViT-B_16",
    num_classes=7,
    norm="BN",
    image_size=24,
    gelu="erf",
    patch_size=4,
    hidden_size=48,
    mlp_dim=96,
    num_heads=3,
    num_layers=3,
    dropout_rate=0.0,
    dtype="float32",
  )
  variables = model.init(jax.random.key(0), images, train=False)
  assert set(variables) == {"params", "batch_stats"}
  logits = model.apply(variables, images, train=False)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  logits, new = model.apply(
    variables,
    images,
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": key},
  )
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert set(new) == {"batch_stats"}


# Names.


def expected_names(norm):
  """Return the names of a two-block model's variables."""
  params = {"cls", "embedding/kernel", "embedding/bias"}
  params |= {"head/kernel", "head/bias"}
  params |= {"Transformer/posembed_input/pos_embedding"}
  statistics = set()
  slots = []
  for i in range(2):
    block = f"Transformer/encoderblock_{i}"
    for layer in (
      *(
        f"MultiHeadDotProductAttention_1/{x}"
        for x in ("query", "key", "value", "out")
      ),
      "MlpBlock_3/Dense_0",
      "MlpBlock_3/Dense_1",
    ):
      params |= {f"{block}/{layer}/kernel", f"{block}/{layer}/bias"}
    if norm == "BN2":
      slots.append(f"{block}/MlpBlock_3/BatchNorm_1")
    if norm == "Rescale":
      params |= {f"{block}/Rescale_2/scale"}
    if norm == "Center":
      params |= {f"{block}/Weighted_{n}/scale" for n in (0, 2)}
    slots += [f"{block}/{SLOTS.get(norm, 'LayerNorm')}_{n}" for n in (0, 2)]
  if norm == "Identity":
    return params, statistics
  if norm != "Rescale":
    slots.append("Transformer/encoder_norm")
  for slot in slots:
    params |= {f"{slot}/{name}" for name in PARAMS.get(norm, ("scale", "bias"))}
    statistics |= {f"{slot}/{name}" for name in STATISTICS.get(norm, ())}
  return params, statistics


SLOTS = {
  "Rescale": "Rescale",
  "RMS": "RMSNorm",
  "DyT": "DyT",
  "Derf": "Derf",
  "Cal": "Cal",
  **{name: name for name in norm_sets.LIKE_DYT},
  **{name: name for name in ("TaperLN", "TaperRMS", "PRepBN", "BHyT")},
  "Center": "CenterNorm",
}
PARAMS = {
  "Rescale": ("bias",),
  "RMS": ("scale",),
  "DyT": ("alpha", "scale", "bias"),
  "Derf": ("alpha", "shift", "scale", "bias"),
  "Cal": ("alpha", "scale", "bias"),
  **dict.fromkeys(norm_sets.LIKE_DYT, ("alpha", "shift", "scale", "bias")),
  "DyISRU": ("beta", "scale", "bias"),
  "TaperLN": ("scale", "change", "bias"),
  "TaperRMS": ("scale", "change"),
  "PRepBN": ("scale", "bias", "bn_scale", "bn_bias", "eta"),
  "BHyT": ("lam", "scale"),
  "Linear": ("alpha", "scale", "bias"),
}
TAPER = ("gain", "dividend", "divisor", "target", "count", "faded")
STATISTICS = {
  "BN": ("mean", "var"),
  "BN2": ("mean", "var"),
  "Rescale": ("init_mean", "count"),
  "Cal": ("init_mean",),
  "Fade": ("log_sigma", "alpha", "count", "faded"),
  "TaperLN": TAPER,
  "TaperRMS": TAPER,
  "PRepBN": ("mean", "var", "count", "faded"),
}


@pytest.mark.parametrize("norm", norms.NORMS)
def test_names_of_variables(norm):
  variables = variables_of(norm)
  params, statistics = expected_names(norm)
  assert set(flatten(variables["params"])) == params
  assert set(flatten(variables.get("batch_stats", {}))) == statistics
  assert set(variables) <= {"params", "batch_stats"}


def test_representation_size_adds_pre_logits_before_the_head():
  model = tiny(representation_size=5)
  params = random_variables(model)["params"]
  assert params["pre_logits"]["kernel"].shape == (16, 5)
  assert params["head"]["kernel"].shape == (5, 3)
  without = {k: v for k, v in params.items() if k != "pre_logits"}
  identity = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
  features = tiny(num_classes=16).apply(
    {"params": {**without, "head": identity}}, images()
  )
  hidden = jnp.tanh(
    features @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"]
  )
  want = hidden @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(
    model.apply({"params": params}, images()), want, atol=1e-5
  )


# Sizes.


def expected_count(name, classes, norm, layers):
  """Return the number of parameters at 224 pixels, from the sizes."""
  p, d, m, *_ = vit_config.VARIANTS[name].values()

  def linear(inputs, outputs):
    return (inputs + 1) * outputs

  tokens = (224 // p) ** 2 + 1
  total = linear(3 * p * p, d) + d + tokens * d + linear(d, classes)
  block = 4 * linear(d, d) + linear(d, m) + linear(m, d)
  if norm == "Rescale":
    return total + layers * (block + 2 * d + 1)
  return total + layers * (block + 4 * d) + 2 * d


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
@pytest.mark.parametrize("name", vit_config.VARIANTS)
def test_every_variant_has_the_parameters_of_its_sizes(name, norm):
  layers = vit_config.VARIANTS[name]["num_layers"]
  assert models.create(name, num_classes=10).config.num_layers == layers
  # All blocks are the same.
  model = models.create(name, num_classes=10, norm=norm, num_layers=2)
  images = jnp.zeros((2, 224, 224, 3))
  logits, variables = jax.eval_shape(
    functools.partial(model.init_with_output, train=False),
    jax.random.key(0),
    images,
  )
  assert logits.shape == (2, 10)
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert count == expected_count(name, 10, norm, layers=2)


@pytest.mark.parametrize(
  "name, patch, width, mlp, heads, layers",
  [
    ("ViT-Ti_16", 16, 192, 768, 3, 12),
    ("ViT-S_16", 16, 384, 1536, 6, 12),
    ("ViT-B_16", 16, 768, 3072, 12, 12),
    ("ViT-B_32", 32, 768, 3072, 12, 12),
    ("ViT-L_16", 16, 1024, 4096, 16, 24),
    ("ViT-L_32", 32, 1024, 4096, 16, 24),
    ("ViT-H_14", 14, 1280, 5120, 16, 32),
  ],
)
def test_sizes_equal_the_paper(name, patch, width, mlp, heads, layers):
  found = vit_config.VARIANTS[name]
  assert found == {
    "patch_size": patch,
    "hidden_size": width,
    "mlp_dim": mlp,
    "num_heads": heads,
    "num_layers": layers,
  }


# Precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_keeps_variables_and_logits_float32(norm, dtype):
  half, full = tiny(norm=norm, dtype=dtype), tiny(norm=norm)
  init = functools.partial(half.init, train=False)
  fresh = jax.eval_shape(init, jax.random.key(0), images(1))
  for name, x in flatten(fresh).items():
    integer = name.endswith(("count", "faded"))
    expected = jnp.int32 if integer else jnp.float32
    assert x.dtype == expected, name
  variables = variables_of(norm)
  got, seen = half.apply(
    variables, images(), train=False, capture_intermediates=True
  )
  want = full.apply(variables, images(), train=False)
  assert got.dtype == jnp.float32
  assert 0 < np.abs(got - want).max() < 0.05  # Rounded somewhere, not much.
  seen = seen["intermediates"]["Transformer"]
  for i in range(2):
    block = seen[f"encoderblock_{i}"]
    assert block["__call__"][0].dtype == dtype
    assert block["MlpBlock_3"]["Dense_0"]["__call__"][0].dtype == dtype
    attention = block["MultiHeadDotProductAttention_1"]["attention"][0]
    assert attention.dtype == jnp.float32
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_bfloat16_statistics_are_float32_means(norm):
  # These values are equal in bfloat16.
  module = norms.NORMS[norm](features=2, dtype=jnp.bfloat16)
  x = jnp.array([[[1.0, 256.0], [1.0, 258.0], [1.0078125, 258.0]]])
  x = x.astype(jnp.bfloat16)
  variables = module.init(jax.random.key(0), x, False)
  y, new = module.apply(variables, x, True, mutable=["batch_stats"])
  assert y.dtype == jnp.bfloat16
  share, stored = (0.1, "mean") if norm == "BN" else (1.0, "init_mean")
  want = share * np.array([1.0026041666, 257.3333333])
  np.testing.assert_allclose(new["batch_stats"][stored], want, rtol=1e-6)


@pytest.mark.parametrize(
  "device, expected",
  [
    (accelerator.Accelerator("cpu"), "float32"),
    (accelerator.Accelerator("tpu"), "bfloat16"),
    (accelerator.Accelerator("gpu"), "bfloat16"),  # AMD GPU.
    (accelerator.Accelerator("gpu", (7, 0)), "float16"),
    (accelerator.Accelerator("gpu", (7, 5)), "float16"),
    (accelerator.Accelerator("gpu", (8, 0)), "bfloat16"),
    (accelerator.Accelerator("gpu", (12, 0)), "bfloat16"),
  ],
)
def test_dtype_auto_follows_the_accelerator(device, expected, monkeypatch):
  monkeypatch.setattr(accelerator, "platform", lambda: device.platform)
  monkeypatch.setattr(accelerator, "current", lambda: device)
  assert tiny(dtype="auto").config.dtype == expected


# Modes.


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
def test_dropout_acts_only_in_training(norm):
  variables = variables_of(norm)
  model = tiny(norm=norm, dropout_rate=0.5)

  first, again, other = (train(model, variables, seed)[0] for seed in (0, 0, 1))
  assert (first == again).all()
  assert (first != other).any()
  evaluated = model.apply(variables, images(), train=False)
  plain = tiny(norm=norm, dropout_rate=0.0)
  assert (evaluated == plain.apply(variables, images(), train=False)).all()


def test_dropout_sites_exclude_attention(monkeypatch):
  variables, zeros, drop = variables_of("LN"), {}, dropout.drop

  def spy(x, key, index, rate, whole=False):
    y = drop(x, key, index, rate, whole)
    assert index not in zeros  # Equal indices would give equal masks.
    zeros[index] = np.mean(np.asarray((y == 0) & (x != 0)))
    return y

  monkeypatch.setattr(dropout, "drop", spy)
  _, seen = tiny(dropout_rate=0.5).apply(
    variables,
    images(64),
    train=True,
    rngs={"dropout": jax.random.key(0)},
    capture_intermediates=True,
  )
  # Dropout after the positions, GELUs and MLPs. The other indices are for
  # stochastic depth.
  elements = {0, 6, 7, 10, 11}
  assert set(zeros) == elements | {4, 5, 8, 9}
  for index, share in zeros.items():
    assert share == pytest.approx(0.5 * (index in elements), abs=0.05), index
  attention = seen["intermediates"]["Transformer"]["encoderblock_0"][
    "MultiHeadDotProductAttention_1"
  ]
  np.testing.assert_allclose(attention["attention"][0].sum(-1), 1, atol=1e-6)
  assert (np.asarray(attention["attention"][0]) > 0).all()
  assert (np.asarray(attention["__call__"][0]) != 0).all()


@pytest.mark.parametrize("block, rate", [(1, 0.25), (2, 0.5)])
def test_stochastic_depth_skips_branches_at_a_linear_rate(block, rate):
  settings = dict(norm="LN", pool="gap", dropout_rate=0.0)
  config = tiny(stochastic_depth=0.5, **settings).config
  whole = vit.EncoderBlock(config, block)
  params = variables_of("LN")["params"]["Transformer"]["encoderblock_0"]
  one = jax.random.normal(jax.random.key(0), (1, 5, 16))
  x = jnp.tile(one, (1000, 1, 1))

  def apply(module, name, *args):
    return module.apply({"params": params[name]}, *args)

  norm = layer_norm.LayerNorm(features=16)
  attention = vit.MultiHeadAttention(config)
  mlp = vit.Mlp(config, 0)
  want = {}
  for kept in itertools.product((0, 1), repeat=2):
    y = apply(norm, "LayerNorm_0", one, True)
    y = apply(attention, "MultiHeadDotProductAttention_1", y, y, True)
    y = one + kept[0] / (1 - rate) * y
    z = apply(norm, "LayerNorm_2", y, True)
    want[kept] = y + kept[1] / (1 - rate) * apply(
      mlp, "MlpBlock_3", z, True, None
    )

  @jax.jit
  def train(seed):
    key = dropout.step_key(jax.random.key(seed))
    return whole.apply({"params": params}, x, True, key)

  got = train(0)
  shares = {
    kept: np.mean(np.abs(got - y).max((1, 2)) < 1e-4)
    for kept, y in want.items()
  }
  for kept, share in shares.items():
    expected = np.prod([1 - rate if k else rate for k in kept])
    assert share == pytest.approx(expected, abs=0.05), kept
  assert sum(shares.values()) == 1
  assert (got != train(1)).any()
  evaluated = whole.apply({"params": params}, one, False, None)
  plain = vit.EncoderBlock(tiny(**settings).config, block)
  np.testing.assert_array_equal(
    evaluated, plain.apply({"params": params}, one, True, None)
  )


def test_stochastic_depth_skips_the_last_block_most():
  model = tiny(norm="LN", dropout_rate=0.0, stochastic_depth=1 - 1e-6)
  variables = random_variables(model)
  _, seen = model.apply(
    variables,
    images(),
    train=True,
    capture_intermediates=lambda module, _: isinstance(
      module, vit.EncoderBlock | vit.PositionEmbedding
    ),
    rngs={"dropout": jax.random.key(0)},
  )
  seen = seen["intermediates"]["Transformer"]
  start, first, last = (
    seen[name]["__call__"][0]
    for name in ("posembed_input", "encoderblock_0", "encoderblock_1")
  )
  assert not np.allclose(first, start, atol=0.01)
  np.testing.assert_array_equal(last, first)


@pytest.mark.parametrize("norm", ["LN", "Rescale"])
def test_gap_gives_the_head_the_mean_of_the_patches(norm):
  variables = variables_of(norm)
  model = tiny(norm=norm, pool="gap")
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), images(1)
  )
  assert jax.tree.structure(shapes) == jax.tree.structure(variables)
  logits, seen = model.apply(
    variables, images(), train=False, capture_intermediates=True
  )
  tokens = seen["intermediates"]["Transformer"]["__call__"][0]
  assert tokens.shape == (4, 5, 16)
  head = variables["params"]["head"]
  mean = sum(tokens[:, i] for i in range(1, 5)) / 4
  np.testing.assert_allclose(
    logits, mean @ head["kernel"] + head["bias"], atol=1e-5
  )
  other = tiny(norm=norm).apply(variables, images(), train=False)
  assert np.abs(logits - other).max() > 1e-2


@pytest.mark.parametrize(
  "norm, options",
  [("BN", {}), ("Rescale", {}), ("BN2", {}), ("LN", {"sigma_reparam": True})],
)
def test_evaluation_never_changes_statistics(norm, options):
  model = tiny(norm=norm, **options)
  variables = random_variables(model)
  _, new = model.apply(
    variables, images(), train=False, mutable=["batch_stats"]
  )
  assert jax.tree.all(
    jax.tree.map(
      lambda a, b: (a == b).all(), new["batch_stats"], variables["batch_stats"]
    )
  )
  _, new = train(model, variables)
  assert jax.tree.all(
    jax.tree.map(
      lambda a, b: (a != b).any(), new["batch_stats"], variables["batch_stats"]
    )
  )


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_initializing_leaves_statistics_untouched(norm):
  model = tiny(norm=norm)
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  statistics = model.init(rngs, images(), train=True)["batch_stats"]
  for name, x in flatten(statistics).items():
    assert (np.asarray(x) == (1 if name.endswith("var") else 0)).all(), name


# Norms and other parts.


# Each residual and option with one norm.
OPTIONS = {
  "LN": {"qk_norm": True},
  "BN": {"residual": "rescalevit"},
  "GN": {"sigma_reparam": True},
  "Rescale": {"residual": "skipinit"},
  "RMS": {"residual": "layerscale"},
  "Cal": {"residual": "rescalenet"},
  "BN2": {"sigma_reparam": True, "qk_norm": True},
}


@pytest.mark.parametrize(
  "norm", norm_sets.most_slow("LN", "BN", "GN", "Rescale", "Cal")
)
def test_every_parameter_has_a_gradient_that_remat_does_not_change(norm):
  kwargs = {"norm": norm, "num_layers": 1, **OPTIONS.get(norm, {})}
  model, again = (tiny(remat=remat, **kwargs) for remat in (False, True))
  # Halfway, all parameters of norms that change during training matter.
  variables = jax.tree_util.tree_map_with_path(
    lambda path, x: x + gradual.FULL // 2 * (path[-1].key == "faded"),
    random_variables(model),
  )

  def loss(model, params):
    logits, new = train(model, {**variables, "params": params})
    return jnp.square(logits).sum(), new

  grad = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
  found = grad(again, variables["params"])
  if norm in ("LN", "BN", "Rescale"):  # Norms with and without statistics.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      found,
      grad(model, variables["params"]),
    )
  without = {k for k, g in flatten(found[0]).items() if not np.any(g)}
  assert not without


def test_batch_norm_in_the_mlp_is_before_the_gelu():
  """Test batch statistics in training and running statistics in evaluation."""
  model = tiny(norm="BN2", dropout_rate=0.0)
  variables = random_variables(model)

  def of_mlp(tree):
    return tree["Transformer"]["encoderblock_1"]["MlpBlock_3"]

  params = of_mlp(variables["params"])
  running = of_mlp(variables["batch_stats"])["BatchNorm_1"]
  rng = np.random.default_rng(1)
  for name in running:
    running[name] = rng.uniform(0.5, 2, running[name].shape)
  for train in (True, False):
    _, seen = model.apply(
      variables,
      images(),
      train=train,
      mutable=["batch_stats", "intermediates"],
      capture_intermediates=True,
    )
    seen = of_mlp(seen["intermediates"])
    x = np.asarray(seen["Dense_0"]["__call__"][0], np.float64)
    mean, var = running["mean"], running["var"]
    if train:
      mean, var = x.mean((0, 1)), x.var((0, 1))
    x = (x - mean) / np.sqrt(var + 1e-6)
    x = x * params["BatchNorm_1"]["scale"] + params["BatchNorm_1"]["bias"]
    x = jax.nn.gelu(x, approximate=False)
    want = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    found = seen["Dense_1"]["__call__"][0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [None, 0.3])
def test_queries_and_keys_are_normalized_head_by_head(cap):
  model = tiny(qk_norm=True, logit_cap=cap)
  variables = random_variables(model)
  _, seen = model.apply(variables, images(), capture_intermediates=True)
  name = "MultiHeadDotProductAttention_1"
  part = seen["intermediates"]["Transformer"]["encoderblock_0"][name]
  params = variables["params"]["Transformer"]["encoderblock_0"][name]
  found = []
  for kind in ("query", "key"):
    x = np.asarray(part[kind]["__call__"][0], np.float64)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    scale = params[f"{kind}_norm"]["scale"]
    assert scale.shape == (8,)
    found.append(x * scale)
  scores = np.einsum("bqhd,bkhd->bhqk", *found) / 8**0.5
  want = jax.nn.softmax(cap * np.tanh(scores / cap) if cap else scores)
  np.testing.assert_allclose(part["attention"][0], want, atol=1e-5)
  value = part["value"]["__call__"][0]
  y = np.einsum("bhqk,bkhd->bqhd", want, value)
  y = np.einsum("bqhd,hdf->bqf", y, params["out"]["kernel"])
  y += params["out"]["bias"]
  np.testing.assert_allclose(part["out"]["__call__"][0], y, atol=1e-5)


def test_unit_initialization_has_variance_1():
  """Test tokens for uniform pixels, and the output of each linear layer."""
  model = models.create(
    "ViT-B_16",
    num_classes=1000,
    norm="LN",
    init="unit",
    image_size=32,
    patch_size=4,
    hidden_size=256,
    mlp_dim=512,
    num_heads=4,
    num_layers=1,
  )
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (8, 32, 32, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  _, seen = model.apply(variables, x, capture_intermediates=True)
  seen = seen["intermediates"]
  block = seen["Transformer"]["encoderblock_0"]
  found = {
    "tokens": seen["Transformer"]["posembed_input"],
    "query": block["MultiHeadDotProductAttention_1"]["query"],
    "value": block["MultiHeadDotProductAttention_1"]["value"],
    "hidden": block["MlpBlock_3"]["Dense_0"],
    "head": seen["head"],
  }
  for name, part in found.items():
    variance = np.square(part["__call__"][0]).mean()
    assert variance == pytest.approx(1, rel=0.15), name
  tokens = found["tokens"]["__call__"][0]
  assert np.square(tokens[0, 0]).mean() == pytest.approx(1, rel=0.3)


def test_group_norm_normalizes_each_image():
  model = tiny(norm="GN", dropout_rate=0.0)
  variables = variables_of("GN")
  batch = images(4)
  together = model.apply(variables, batch, train=True)
  alone = [
    model.apply(variables, batch[i : i + 1], train=True) for i in range(4)
  ]
  np.testing.assert_allclose(together, jnp.concatenate(alone), atol=1e-5)


def test_group_norm_normalizes_tokens_and_consecutive_channels():
  module = group_norm.GroupNorm(features=8)
  x = jax.random.normal(jax.random.key(0), (2, 5, 8)) * 3 + 1
  x = x * jnp.arange(1, 9)
  y = module.apply(module.init(jax.random.key(0), x, True), x, True)
  groups = np.asarray(x).reshape(2, 5, 4, 2)
  mean = groups.mean((1, 3), keepdims=True)
  std = groups.std((1, 3), keepdims=True)
  want = ((groups - mean) / std).reshape(2, 5, 8)
  np.testing.assert_allclose(y, want, atol=1e-4)


def test_layer_norm_normalizes_each_token():
  module = layer_norm.LayerNorm(features=8)
  x = jax.random.normal(jax.random.key(0), (2, 5, 8)) * 3 + 1
  y = module.apply(module.init(jax.random.key(0), x, True), x, True)
  np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)


def test_batch_norm_does_not_depend_on_the_order_of_the_batch():
  model = tiny(norm="BN", dropout_rate=0.0)
  apply = functools.partial(
    model.apply, variables_of("BN"), train=True, mutable=["batch_stats"]
  )
  order = jnp.array([2, 0, 3, 1])
  logits, statistics = apply(images())
  permuted, others = apply(images()[order])
  np.testing.assert_allclose(logits[order], permuted, atol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    statistics,
    others,
  )


def test_batch_norm_depends_on_other_images_only_in_training():
  model = tiny(norm="BN", dropout_rate=0.0)
  variables = variables_of("BN")
  batch = images()
  other = batch.at[1:].mul(0.5)
  evaluate = functools.partial(model.apply, variables, train=False)
  np.testing.assert_allclose(evaluate(batch)[0], evaluate(other)[0], atol=1e-6)

  def train(x):
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

  assert np.abs(train(batch)[0] - train(other)[0]).max() > 1e-3


def test_rescale_calibrates_eight_times_then_freezes():
  module = rescale.Rescale(features=3)
  x = jax.random.normal(jax.random.key(0), (10, 2, 5, 3)) + 1
  variables = module.init(jax.random.key(0), x[0], False)
  variables["params"]["bias"] = jnp.array([1.0, 2.0, 3.0])
  for i in range(10):
    y, new = module.apply(variables, x[i], True, mutable=["batch_stats"])
    variables = {**variables, **new}
    seen = x[: min(i + 1, 8)].mean((0, 1, 2))
    factor = 0.01 if i < 8 else 1.0
    want = x[i] + factor * jnp.array([1.0, 2.0, 3.0]) - seen
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert variables["batch_stats"]["count"] == min(i + 1, 8)


def test_rescale_has_no_gradient_through_its_mean():
  module = rescale.Rescale(features=3)
  x = jax.random.normal(jax.random.key(0), (2, 5, 3))
  variables = module.init(jax.random.key(0), x, False)

  def total(x):
    return module.apply(variables, x, True, mutable=["batch_stats"])[0].sum()

  np.testing.assert_allclose(jax.grad(total)(x), 1.0, atol=1e-6)


class TanhNorm(base.Norm):
  """y = tanh(alpha x), without a final norm."""

  SLOT = "Tanh"
  FINAL = False

  @flax.linen.compact
  def __call__(self, x, train):
    alpha = self.param("alpha", flax.linen.initializers.ones, (1,))
    return jnp.tanh(alpha * x).astype(self.dtype)


def test_new_norm_needs_one_class_and_one_entry(monkeypatch):
  monkeypatch.setitem(norms.NORMS, "Tanh", TanhNorm)
  model = tiny(norm="Tanh")
  sgd = optimizers.sgd(
    optax.constant_schedule(0.1),
    momentum=0.9,
    weight_decay=0.0,
    grad_norm_clip=1.0,
  )
  state = train_state.init_state(model, sgd, image_size=8, seed=0)
  alpha = "Transformer/encoderblock_1/Tanh_2/alpha"
  before = flatten(state.params)
  assert alpha in before
  assert "Transformer/encoder_norm/scale" not in before
  train_step = functools.partial(
    train_step_lib.train_step,
    model=model,
    optimizer=sgd,
    augment=preprocess.Augment(),
    image_size=8,
    seed=0,
  )
  state, metrics = jax.jit(train_step)(
    state,
    jax.random.randint(jax.random.key(0), (1, 4, 8, 8, 3), 0, 256, jnp.uint8),
    jnp.array([[0, 1, 2, 0]]),
  )
  assert np.isfinite(metrics["loss"])
  assert flatten(state.params)[alpha] != before[alpha]
  assert detect.norm(before) == "Tanh"
  assert plots.norm_color("Tanh") == base.Norm.COLOR


class SiteSchedule(NamedTuple):
  """A schedule that records its site."""

  site: int = -1
  num_sites: int = -1

  def at_site(self, site, num_sites):
    return SiteSchedule(site, num_sites)


def test_a_norm_with_a_schedule_gets_the_schedule_of_its_site(monkeypatch):
  schedules = []

  class Scheduled(base.Norm):
    schedule: SiteSchedule | None = None

    def __call__(self, x, train):
      schedules.append(self.schedule)
      return x

  monkeypatch.setitem(norms.NORMS, "Scheduled", Scheduled)
  for schedule, want in (
    (SiteSchedule(), [SiteSchedule(i, 5) for i in range(5)]),
    (None, [None] * 5),
  ):
    schedules.clear()
    model = tiny(norm="Scheduled", norm_schedule=schedule)
    jax.eval_shape(model.init, jax.random.key(0), images(1))
    assert schedules == want
