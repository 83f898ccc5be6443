"""Diagnostic measurements against values computed by hand."""

import functools
import math

from flax import traverse_util
import jax
import norm_sets
import numpy as np
import pytest
import tiny_model

from rescalevit_jax import models
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.training import measurements

IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3))
IMAGES = IMAGES.astype(np.float32)
# The tiny model has 16 channels, 4 patches of 4x4 pixels, MLP 32, 5 classes.
ATTENTION = 4 * (16 * 16 + 16)
BLOCK = ATTENTION + 16 * 32 + 32 + 32 * 16 + 16 + 2 * 2 * 16
EMBEDDING = 4 * 4 * 3 * 16 + 16 + 16 + 5 * 16
HEAD = 16 * 5 + 5 + 2 * 16


@pytest.fixture(scope="module")
def tiny():
  return tiny_model.create(num_layers=2)


def measure(model, variables, images=IMAGES):
  # Compilation would take longer than eager execution.
  return jax.device_get(measurements.forward(model, variables, images))


def known_stream(model, variables):
  """Make the residual stream constant.

  The class token is 2. Patches are 1 in half of the channels and -3 in the
  others. Each block adds 0.5.
  """
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  flat = {
    k: np.zeros(x.shape, np.float32) if "Norm" not in k else x
    for k, x in flat.items()
  }
  flat["cls"] += 2
  flat["embedding/bias"] += np.repeat([1, -3], 8)
  for i in range(model.config.num_layers):
    block = f"Transformer/encoderblock_{i}"
    flat[f"{block}/MultiHeadDotProductAttention_1/out/bias"] += 0.3
    flat[f"{block}/MlpBlock_3/Dense_1/bias"] += 0.2
  return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}


def test_stream_statistics_before_and_after_each_block(tiny):
  found = measure(tiny.model, known_stream(tiny.model, tiny.variables))
  cls, low, high = (np.array([x, x + 0.5, x + 1]) for x in (2, -3, 1))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  close(found["stream_rms_cls"], cls)
  close(found["stream_mean_cls"], cls)
  close(found["stream_rms_patches"], np.sqrt((low**2 + high**2) / 2))
  close(found["stream_mean_patches"], (low + high) / 2)
  close(found["attention_entropy"], [math.log(5)] * 2)
  assert not any("saturation" in name for name in found)


def test_entropy_equals_the_entropy_of_attention_maps(tiny):
  images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
  want = attention_maps.statistics(tiny, images).entropy
  found = measure(tiny.model, tiny.variables, tiny.inputs(images))
  np.testing.assert_allclose(found["attention_entropy"], want, rtol=1e-5)
  assert (np.abs(want - math.log(5)) > 1e-3).all()


# Inputs u where the slope, 1 - tanh^2 u or exp(-u^2), is a tenth.
@pytest.mark.parametrize(
  "norm, bound",
  [("DyT", math.atanh(0.9**0.5)), ("Derf", math.log(10) ** 0.5)],
)
def test_saturation_is_the_share_of_slopes_below_a_tenth(norm, bound):
  tiny = tiny_model.create(norm, num_layers=1)
  params = known_stream(tiny.model, tiny.variables)["params"]
  alpha = bound / 2  # |alpha x| equals bound at the class token.
  transformer = params["Transformer"]
  block = transformer["encoderblock_0"]
  for place, factor in (
    (block[f"{norm}_0"], 0.999),  # Only the patches' -3 exceeds the bound.
    (block[f"{norm}_2"], 1.001),  # 2.3; 1.3 and -2.7.
    (transformer["encoder_norm"], 1.001 * 2 / 1.5),  # 2.5; 1.5 and -2.5.
  ):
    place["alpha"] = place["alpha"] + factor * alpha
  found = measure(tiny.model, {"params": params, "batch_stats": {}})
  np.testing.assert_allclose(found["saturation_attention"], [4 * 8 / 80])
  np.testing.assert_allclose(found["saturation_mlp"], [(16 + 4 * 8) / 80])
  np.testing.assert_allclose(found["head/saturation"], 1)


def scaled(tree, factors):
  """Multiply each part of a tree: embedding, two blocks, head."""
  flat = traverse_util.flatten_dict(tree, sep="/")

  def factor(key):
    if "encoderblock_" in key:
      return factors[1 + int(key.split("/")[1].removeprefix("encoderblock_"))]
    last = key.startswith("head/") or "encoder_norm" in key
    return factors[3] if last else factors[0]

  flat = {key: factor(key) * x for key, x in flat.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def test_gradient_norms_of_parts(tiny):
  ones = jax.tree.map(np.ones_like, tiny.variables["params"])
  found = measurements.gradient_norms(scaled(ones, [1, 2, 3, 4]))
  sizes = np.array([EMBEDDING, BLOCK, BLOCK, HEAD])
  want = np.sqrt(sizes) * [1, 2, 3, 4]
  np.testing.assert_allclose(found["grad_norm"], want, rtol=1e-6)
  want = np.sqrt(ATTENTION / 2) * np.array([2, 3])
  np.testing.assert_allclose(found["grad_norm_qk"], want, rtol=1e-6)
  assert sizes.sum() == sum(x.size for x in jax.tree.leaves(ones))


def test_update_ratios_of_parts(tiny):
  before = tiny.variables["params"]
  after = scaled(before, [1, 1.25, 0.5, 2])
  found = measurements.after_step(before, after)
  want = [0, 0.25, 0.5, 1]
  np.testing.assert_allclose(found["update_ratio"], want, rtol=1e-5)


def test_learned_scalars_by_hand():
  model = models.create(
    "ViT-XS_2",
    num_classes=5,
    image_size=8,
    norm="Derf",
    residual="layerscale",
    qk_norm=True,
    sigma_reparam=True,
    **{"patch_size": 4, "hidden_size": 8, "num_layers": 2, "mlp_dim": 8},
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
  flat = {
    key: np.full(x.shape, 7, np.float32)
    for key, x in traverse_util.flatten_dict(shapes, sep="/").items()
  }
  for i in range(2):
    block = f"Transformer/encoderblock_{i}"
    flat[f"{block}/Derf_0/alpha"] *= i
    flat[f"{block}/Derf_2/shift"] *= -1
    flat[f"{block}/Derf_2/scale"][:4] = 1  # RMS 5.
    flat[f"{block}/LayerScale_2/scale"] *= i
    flat[f"{block}/MlpBlock_3/Dense_1/gamma"] *= 3
  params = traverse_util.unflatten_dict(flat, sep="/")
  found = measurements.scalars(params)
  layers = ("query", "key", "value", "out", "Dense_0")
  usual = {f"gamma_{x}" for x in layers} | {
    f"scale_{x}_norm" for x in layers[:2]
  }
  usual |= {"shift_attention", "scale_attention", "branch_attention"}
  want = dict.fromkeys(usual | {"alpha_mlp"}, [7, 7])
  want |= {"alpha_attention": [0, 7], "shift_mlp": [-7, -7]}
  want |= {"scale_mlp": [5, 5], "branch_mlp": [0, 7], "gamma_Dense_1": [21, 21]}
  want |= dict.fromkeys(("head/alpha", "head/shift", "head/scale"), 7)
  assert found.keys() == want.keys()
  for name, values in want.items():
    np.testing.assert_allclose(found[name], values, err_msg=name)


def test_norms_before_and_after_a_branch_are_distinguished():
  path = ("PeriDyT_2", "alpha"), ("DyT_2", "alpha"), ("PostDyT_2", "alpha")
  names = [measurements._scalar_name(x) for x in path]
  assert names == ["alpha_peri_mlp", "alpha_mlp", "alpha_mlp"]


@pytest.mark.parametrize(
  ("norm", "names"),
  [("TaperLN", {"scale", "change"}), ("PRepBN", {"scale", "bn_scale", "eta"})],
)
def test_names_of_other_learned_scalars(norm, names):
  tiny = tiny_model.create(norm, num_layers=1)  # Its parameters doubled.
  found = measurements.scalars(tiny.variables["params"])
  sites = ("attention", "mlp")
  want = {f"{name}_{site}" for name in names for site in sites}
  assert found.keys() == want | {f"head/{name}" for name in names}


def test_rescalevits_scale_is_the_multiplier_of_the_mlps_branch():
  tiny = tiny_model.create("Rescale", num_layers=1)  # Its parameters doubled.
  found = measurements.scalars(tiny.variables["params"])
  assert found.keys() == {"branch_mlp"} and found["branch_mlp"] == 2


@pytest.mark.parametrize(
  "norm, remat",
  [("DyT", True), *((norm, False) for norm in norm_sets.DIFFERENT)],
)
def test_every_norm_and_residual_is_measured(norm, remat):
  model = models.create(
    "ViT-XS_2",
    num_classes=5,
    image_size=8,
    norm=norm,
    residual="layerscale",
    qk_norm=True,
    sigma_reparam=True,
    pool="gap",
    remat=remat,
    dtype="bfloat16",
    **{"patch_size": 4, "hidden_size": 8, "num_layers": 1},
  )

  def found():  # Only shapes are evaluated.
    variables = model.init(jax.random.key(0), IMAGES)
    params = variables["params"]
    return measurements.forward(model, variables, IMAGES) | (
      measurements.gradient_norms(params)
    )

  shapes = {name: x.shape for name, x in jax.eval_shape(found).items()}
  want = {"grad_norm": (3,), "grad_norm_qk": (1,), "attention_entropy": (1,)}
  want |= {
    f"stream_{kind}_{tokens}": (2,)
    for kind in ("rms", "mean")
    for tokens in ("cls", "patches")
  }
  if norm in ("DyT", "Derf", "Fade", "BHyT"):
    want |= {"saturation_attention": (1,), "saturation_mlp": (1,)}
    want |= {"head/saturation": ()}
  assert shapes == want


def test_by_name_drops_nonfinite_values():
  found = {
    "grad_norm": np.arange(4.0),
    "stream_rms_cls": np.array([5.0, np.inf, 6.0]),
    "attention_entropy": np.array([np.nan, 7.0]),
    "sharpness": np.float32(8),
  }
  assert measurements.by_name(found, 2) == {
    "embedding/grad_norm": 0,
    "block_00/grad_norm": 1,
    "block_01/grad_norm": 2,
    "head/grad_norm": 3,
    "embedding/stream_rms_cls": 5,
    "block_01/stream_rms_cls": 6,
    "block_01/attention_entropy": 7,
    "sharpness": 8,
  }
