"""Formulas of residuals, and combinations with every norm."""

import functools

import flax
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import models
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals

X, Y = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)


def joined(kind, scale=None, **kwargs):
  module = residuals.RESIDUALS[kind](4, **kwargs)
  variables = module.init(jax.random.key(0), X, Y)
  if scale is not None:
    variables = {"params": {"scale": jnp.array(scale)}}
  return module.apply(variables, X, Y)


def close(found, want):
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_plain_residual_adds():
  close(joined("plain", branch=3, num_blocks=9), X + Y)


def test_rescalevit_scales_only_the_residual_of_the_mlp():
  close(joined("rescalevit", branch=5, num_blocks=9), X + Y)
  # Branch 6 is the MLP of block 3: sqrt(k / (k + 1)) x + scale L^(-1/2) y.
  found = joined("rescalevit", [2.0], branch=6, num_blocks=9)
  close(found, 0.75**0.5 * X + 2 / 3 * Y)


@pytest.mark.parametrize(
  "branch, c, skip, weight",
  [
    (1, None, 18 / 19, 1 / 19),
    (18, None, 35 / 36, 1 / 36),
    (1, 1.0, 1 / 2, 1 / 2),
    (5, 0.5, 4.5 / 5.5, 1 / 5.5),
  ],
)
def test_rescalenet_follows_the_paper_on_every_branch(branch, c, skip, weight):
  assert skip + weight == pytest.approx(1)  # The variance is preserved.
  kwargs = dict(branch=branch, num_blocks=9, c=c)
  close(joined("rescalenet", **kwargs), skip**0.5 * X + weight**0.5 * Y)
  found = joined("rescalenet", [3.0], **kwargs)
  close(found, skip**0.5 * X + 3 * weight**0.5 * Y)


@pytest.mark.parametrize(
  "kind", ["rescalevit", "rescalenet", "skipinit", "layerscale", "weighted"]
)
def test_gradients_equal_finite_differences(kind):
  module = residuals.RESIDUALS[kind](4, branch=2, num_blocks=9)
  variables = module.init(jax.random.key(0), X, Y)
  params = jax.tree.map(lambda x: 0.7 + 0 * x, variables["params"])

  def join(params, x, y):
    return module.apply({"params": params}, x, y)

  test_util.check_grads(join, (params, X, Y), 1, atol=1e-2, rtol=1e-2)
  y_gradient = jax.grad(lambda y: join(params, X, y).sum())(Y)
  assert np.abs(y_gradient).min() > 0


def test_skipinit_initially_ignores_the_branch():
  close(joined("skipinit", branch=1, num_blocks=2), X)
  close(joined("skipinit", [0.3], branch=1, num_blocks=2), X + 0.3 * Y)


@pytest.mark.parametrize(
  "blocks, start", [(12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)]
)
def test_layerscale_starts_by_depth(blocks, start):
  module = residuals.LayerScale(4, branch=1, num_blocks=blocks)
  scale = module.init(jax.random.key(0), X, Y)["params"]["scale"]
  np.testing.assert_allclose(scale, np.full(4, start), rtol=1e-6)
  scale = [0.1, 0.2, 0.3, 0.4]
  found = joined("layerscale", scale, branch=1, num_blocks=blocks)
  close(found, X + np.array(scale) * Y)


def test_convex_weights_sum_to_one():
  close(joined("convex", branch=3, num_blocks=8), 15 / 16 * X + Y / 16)


def test_weighted_starts_at_one_over_the_number_of_blocks():
  close(joined("weighted", branch=3, num_blocks=8), X + Y / 8)


@pytest.mark.parametrize("kind", residuals.RESIDUALS)
def test_bfloat16_rounds_once(kind):
  module = residuals.RESIDUALS[kind](
    4, branch=4, num_blocks=9, dtype=jnp.bfloat16
  )
  x, y = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
  variables = module.init(jax.random.key(0), x, y)
  found = module.apply(variables, x, y)
  assert found.dtype == jnp.bfloat16
  whole = residuals.RESIDUALS[kind](4, branch=4, num_blocks=9)
  want = whole.apply(variables, x.astype(jnp.float32), y.astype(jnp.float32))
  assert (found == want.astype(jnp.bfloat16)).all()


@functools.cache
def shapes(norm, residual):
  model = models.create(
    "ViT-XS_4",
    num_classes=3,
    norm=norm,
    residual=residual,
    image_size=8,
    num_layers=2,
  )
  found = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jnp.zeros((1, 8, 8, 3)),
  )
  block = found["params"]["Transformer"]["encoderblock_1"]
  return flax.traverse_util.flatten_dict(block, sep="/")


@pytest.mark.parametrize("norm", norms.NORMS)
@pytest.mark.parametrize("kind", ["auto", *residuals.RESIDUALS])
def test_every_norm_works_with_every_residual(norm, kind):
  """Parameter names are part of the public interface."""
  found, without = shapes(norm, kind), shapes(norm, "plain")
  want = {
    "plain": {},
    "rescalevit": {"Rescale_2/scale": (1,)},
    "rescalenet": {"RescaleNet_0/scale": (1,), "RescaleNet_2/scale": (1,)},
    "skipinit": {"SkipInit_0/scale": (1,), "SkipInit_2/scale": (1,)},
    "layerscale": {"LayerScale_0/scale": (64,), "LayerScale_2/scale": (64,)},
    "convex": {},
    "weighted": {"Weighted_0/scale": (64,), "Weighted_2/scale": (64,)},
  }
  own = {"Rescale": "rescalevit", "Center": "weighted"}
  want["auto"] = want[own.get(norm, "plain")]
  added = {k: x.shape for k, x in found.items() if k not in without}
  assert added == want[kind]
  assert without.keys() <= found.keys()


def test_branches_are_numbered_from_1():
  """With branches that return 1, the logits depend only on the residuals."""
  model = models.create(
    "ViT-XS_4",
    num_classes=64,
    norm="Identity",
    residual="rescalenet",
    residual_c=2.0,
    image_size=8,
    num_layers=2,
  )
  start = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  params = jax.tree.map(jnp.zeros_like, start)["params"]
  for i in range(2):
    block = params["Transformer"][f"encoderblock_{i}"]
    block["MultiHeadDotProductAttention_1"]["out"]["bias"] += 1
    block["MlpBlock_3"]["Dense_1"]["bias"] += 1
    for slot in ("RescaleNet_0", "RescaleNet_2"):
      block[slot]["scale"] += 1
  params["head"]["kernel"] = jnp.eye(64)
  logits = model.apply({"params": params}, jnp.zeros((1, 8, 8, 3)))
  want = 0.0
  for k in (1, 2, 3, 4):
    want = ((k + 1) / (k + 2)) ** 0.5 * want + (k + 2) ** -0.5
  close(logits, np.full((1, 64), want))
