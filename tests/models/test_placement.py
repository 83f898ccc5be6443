"""Position of norms, depth scaling, and constants of norms."""

import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import subjects
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import vit
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import batch_norm
from rescalevit_jax.models.norms import taper
from rescalevit_jax.pretrained import fold
from rescalevit_jax.pretrained import npz
from rescalevit_jax.training import measurements

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3))
IMAGES = IMAGES.astype(np.float32)


def tiny(**options):
  settings = dict(norm="LN", dropout_rate=0.0) | trees.TINY | options
  return models.create("ViT-B_16", num_classes=3, image_size=8, **settings)


def random_variables(model):
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), IMAGES
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0.2, 0.5, x.shape).astype(x.dtype), shapes
  )


def layer_norm(params, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * params["scale"] + params["bias"]


@pytest.mark.parametrize(
  "position, scaling",
  [("pre", False), ("pre", True), ("peri", False), ("peri", True), ("post", 0)],
)
def test_block_by_hand(position, scaling):
  model = tiny(norm_position=position, norm_depth_scaling=bool(scaling))
  c = model.config
  params = random_variables(model)["params"]["Transformer"]["encoderblock_0"]
  x = np.random.default_rng(2).normal(size=(3, 5, 8)).astype(np.float32)
  scale = 3**-0.5 if scaling else 1.0

  def attend(y):
    module = vit.MultiHeadAttention(c)
    own = {"params": params["MultiHeadDotProductAttention_1"]}
    return module.apply(own, y, y, False)

  def mlp(y):
    return vit.Mlp(c, 0).apply({"params": params["MlpBlock_3"]}, y, False, None)

  want = x
  for function, number in ((attend, 0), (mlp, 2)):
    if position == "post":
      site = params[f"PostLayerNorm_{number}"]
      want = layer_norm(site, want + function(want))
      continue
    y = function(scale * layer_norm(params[f"LayerNorm_{number}"], want))
    if position == "peri":
      y = layer_norm(params[f"PeriLayerNorm_{number}"], y)
    want = want + y
  found = vit.EncoderBlock(c, 3).apply({"params": params}, x, False, None)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "options, added, removed",
  [
    ({}, (), ()),
    ({"norm_depth_scaling": True}, (), ()),
    ({"embedding_norm": True}, ["embedding_norm"], ()),
    ({"norm_position": "peri"}, ["PeriLayerNorm_0", "PeriLayerNorm_2"], ()),
    (
      {"norm_position": "post"},
      ["PostLayerNorm_0", "PostLayerNorm_2"],
      ["LayerNorm_0", "LayerNorm_2", "encoder_norm"],
    ),
  ],
)
def test_position_changes_only_names_of_norms(options, added, removed):
  """Names of other parameters do not change."""

  def modules(tree):
    flat = traverse_util.flatten_dict(tree["params"], sep="/")
    return {("/" + key).split("/")[-2] for key in flat}

  before, after = (modules(random_variables(tiny(**o))) for o in ({}, options))
  assert after - before == {*added} and before - after == {*removed}


def test_embedding_norm_comes_before_the_first_block():
  model = tiny(embedding_norm=True)
  variables = random_variables(model)
  _, seen = model.apply(variables, IMAGES, capture_intermediates=True)
  seen = seen["intermediates"]["Transformer"]
  site = variables["params"]["Transformer"]["embedding_norm"]
  want = layer_norm(site, seen["posembed_input"]["__call__"][0])
  (found,) = seen["embedding_norm"]["__call__"]
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
  measured = measurements.forward(model, variables, IMAGES)
  rms = np.sqrt(np.square(want[:, 1:]).mean())
  np.testing.assert_allclose(measured["stream_rms_patches"][0], rms, rtol=1e-4)


@pytest.mark.parametrize("position", ["post", "peri"])
def test_last_block_may_compute_only_the_class_token(position):
  model = tiny(norm_position=position)
  variables = random_variables(model)
  found = model.apply(variables, IMAGES)
  want, _ = model.apply(variables, IMAGES, mutable=["intermediates"])
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["pre", "post", "peri"])
def test_saturation_is_measured_at_every_position(position):
  model = tiny(norm="DyT", norm_position=position)
  found = measurements.forward(model, random_variables(model), IMAGES)
  assert found["saturation_mlp"].shape == (2,)
  assert ("head/saturation" in found) == (position != "post")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"norm_position": "mid"}, "norm_position: unknown 'mid'; .*pre, post"),
    ({"norm": "Rescale", "norm_position": "peri"}, "Rescale does not.*peri"),
    ({"norm": "Identity", "embedding_norm": True}, "Identity does not.*True"),
    ({"norm_position": "post", "norm_depth_scaling": True}, "choose pre or"),
    ({"norm": "GN", "gn_groups": 3}, "8 is not divisible by the 3 groups"),
    ({"layerscale_init": 0.0}, "layerscale_init: 0.0 is not > 0"),
    ({"norm_epsilon": 0.0}, "norm_epsilon: 0.0 is not > 0"),
    ({"residual_c": 3.0}, "residual_c: 3.0 has no effect with .*plain;"),
    (
      {"norm": "Center", "layerscale_init": 0.3},
      "layerscale_init: 0.3 has no effect with .*weighted; .*=layerscale",
    ),
  ],
)
def test_invalid_combinations_are_refused(options, message):
  with pytest.raises(errors.UserError, match=message):
    tiny(**options)


@pytest.mark.parametrize(
  "options",
  [
    {"norm_position": "peri", "embedding_norm": True},
    {"norm": "BN", "norm_position": "post"},
    {"norm": "Cal", "norm_position": "peri"},
  ],
)
def test_placement_is_inferred_from_a_file(options, tmp_path):
  variables = random_variables(tiny(**options))
  params, stats = variables["params"], variables.get("batch_stats", {})
  npz.save(tmp_path / "a.npz", params, stats)
  found = npz_model.load(tmp_path / "a.npz").model.config
  for key, value in options.items():
    assert getattr(found, key) == value
  if options["norm_position"] == "peri":
    with pytest.raises(errors.UserError, match="--fold: only norms before"):
      fold.fold("Cal", params, stats)


def test_constants_are_options_after_a_file_name(tmp_path):
  variables = random_variables(tiny(norm="GN", gn_groups=2))
  npz.save(tmp_path / "a.npz", variables["params"], {})
  words = "GN,groups=2,eps=1e-05,depth_scaling,convex,logit_cap=50"
  (subject,) = subjects.load([], [f"{tmp_path}/a.npz:{words}"])
  found = subject.model.model.config
  constants = found.gn_groups, found.norm_epsilon, found.logit_cap
  assert constants == (2, 1e-5, 50.0)
  assert found.norm_depth_scaling and found.residual == "convex"
  with pytest.raises(errors.UserError, match="unknown or too many: 'groups=x'"):
    subjects.load([], [f"{tmp_path}/a.npz:groups=x"])


def test_a_schedule_counts_only_existing_sites():
  """With post-norm, the last site is the second norm of the last block."""
  ends = {}
  for position in ("pre", "post"):
    plan = taper.Schedule(0.0, 8.0, 0.5, anchor=1.0)
    model = tiny(norm="TaperLN", norm_position=position, norm_schedule=plan)
    found = []

    def note(next_method, args, kwargs, context, found=found):
      if isinstance(context.module, taper.TaperLN):
        found.append(context.module.schedule)
      return next_method(*args, **kwargs)

    with nn.intercept_methods(note):
      jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    ends[position] = found[-1].anchor
  assert ends == {"pre": 1.0, "post": 1.0}


def test_folding_includes_depth_scaling_and_epsilon():
  model = tiny(norm="BN", norm_depth_scaling=True, norm_epsilon=0.5)
  variables = jax.tree.map(np.abs, random_variables(model))
  whole = trained_model.TrainedModel("a", model, variables, 8, "abc")
  folded = whole.fold()
  assert folded.model.config.norm == "Identity"
  found = folded.model.apply(folded.variables, IMAGES)
  want = model.apply(variables, IMAGES)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


X = np.random.default_rng(3).normal(0.5, 0.1, (3, 4, 8)).astype(np.float32)


@pytest.mark.parametrize(
  "norm, axes, center",
  [("LN", 2, 1), ("RMS", 2, 0), ("BN", (0, 1), 1), ("Fade", 2, 1)],
)
def test_epsilon_by_hand(norm, axes, center):
  module = norms.NORMS[norm](8, options=base.Options(epsilon=0.5))
  start = module.init(jax.random.key(0), X, True)
  found, _ = module.apply(start, X, True, mutable=["batch_stats"])
  x = X - center * X.mean(axes, keepdims=True)
  want = x / np.sqrt((x**2).mean(axes, keepdims=True) + 0.5)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_batch_norms_momentum_and_epsilon_in_evaluation():
  options = base.Options(momentum=0.25, epsilon=0.5)
  module = batch_norm.BatchNorm(8, options=options)
  start = module.init(jax.random.key(0), X, True)
  _, new = module.apply(start, X, True, mutable=["batch_stats"])
  mean, var = new["batch_stats"]["mean"], new["batch_stats"]["var"]
  np.testing.assert_allclose(mean, 0.75 * X.mean((0, 1)), rtol=1e-5)
  want = 0.25 + 0.75 * X.var((0, 1), ddof=1)
  np.testing.assert_allclose(var, want, rtol=1e-5)
  found = module.apply({**start, **new}, X, False)
  want = (X - mean) / np.sqrt(var + 0.5)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum, batches", [(0.9, 48), (0.99, 503), (0, 1)])
def test_momentum_determines_the_number_of_stats_batches(momentum, batches):
  options = base.Options(momentum=momentum)
  assert batch_norm.BatchNorm.num_stats_batches(options) == batches


def test_group_norm_with_two_groups_by_hand():
  module = norms.NORMS["GN"](8, options=base.Options(groups=2))
  found = module.apply(module.init(jax.random.key(0), X, True), X, True)
  groups = X.reshape(3, 4, 2, 4)
  groups = groups - groups.mean((1, 3), keepdims=True)
  want = groups / np.sqrt((groups**2).mean((1, 3), keepdims=True) + 1e-6)
  np.testing.assert_allclose(found, want.reshape(X.shape), rtol=1e-4, atol=1e-4)


def test_constants_are_passed_to_modules():
  options = {"qk_norm": True, "norm": "BN2", "residual": "layerscale"}
  constants = {"norm_epsilon": 0.5, "bn_momentum": 0.25}
  model = tiny(**options, **constants, layerscale_init=0.3)
  seen = {}

  def spy(module, method):
    if isinstance(module, base.Norm) and method == "__call__":
      seen[module.name] = module.options
    if isinstance(module, residuals.LayerScale):
      seen[module.name] = module.layerscale_init
    return False

  variables = random_variables(model)
  model.apply(variables, IMAGES, capture_intermediates=spy)
  own = {k: v for k, v in seen.items() if not k.startswith("LayerScale")}
  assert {"query_norm", "BatchNorm_1", "LayerNorm_0", "encoder_norm"} <= {*own}
  assert {(x.epsilon, x.momentum) for x in own.values()} == {(0.5, 0.25)}
  assert seen["LayerScale_0"] == 0.3
  scale = residuals.LayerScale(2, branch=1, num_blocks=30, layerscale_init=0.3)
  x = jnp.zeros((1, 1, 2))
  found = scale.init(jax.random.key(0), x, x)["params"]["scale"]
  np.testing.assert_allclose(found, 0.3, rtol=1e-6)
