"""The optimizers and gradient clipping against arithmetic by hand."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rescalevit_jax import errors
from rescalevit_jax.optim import optimizers
from rescalevit_jax.training import experiment

PARAMS = {
  "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
  "bias": jnp.array([4.0, -1.0]),
  "scale": jnp.array([2.0]),
  "cls": jnp.array([[[-3.0, 1.0]]]),
}


def steps_of(gradients, **kwargs):
  """Yield the parameters after updates with learning rates 0.1, 0.2, ..."""
  sgd = optimizers.sgd(lambda count: 0.1 * (count + 1), **kwargs)
  params, state = PARAMS, sgd.init(PARAMS)
  for grads in gradients:
    updates, state = jax.jit(sgd.update)(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield params


def steps_by_hand(gradients, momentum, weight_decay, grad_norm_clip):
  """Yield the same parameters in plain NumPy, one line per rule."""
  params = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
  buffers = {k: 0.0 for k in params}
  for n, grads in enumerate(gradients, start=1):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    factor = min(1.0, grad_norm_clip / norm) if grad_norm_clip else 1.0
    for k in params:
      g = factor * grads[k] + weight_decay * params[k]
      buffers[k] = momentum * buffers[k] + g
      params[k] = params[k] - 0.1 * n * buffers[k]
    yield dict(params)


@pytest.mark.parametrize(
  "momentum, weight_decay, grad_norm_clip",
  [
    (0.0, 0.0, 0),
    (0.9, 0.0, 0),
    (0.9, 0.1, 0),
    (0.9, 0.0, 1.0),  # Clips the first and third gradient.
    (0.9, 0.1, 1.0),
  ],
)
def test_sgd_by_hand(momentum, weight_decay, grad_norm_clip):
  kwargs = dict(
    momentum=momentum, weight_decay=weight_decay, grad_norm_clip=grad_norm_clip
  )
  rng = np.random.default_rng(0)
  gradients = [
    {k: size * rng.uniform(-1, 1, v.shape) for k, v in PARAMS.items()}
    for size in (3.0, 0.1, 3.0)
  ]
  got = list(steps_of(gradients, **kwargs))
  want = list(steps_by_hand(gradients, **kwargs))
  for step, (ours, theirs) in enumerate(zip(got, want, strict=True), start=1):
    for k in PARAMS:
      np.testing.assert_allclose(
        ours[k], theirs[k], rtol=1e-5, atol=1e-6, err_msg=f"{k}, step {step}"
      )


def test_weight_decay_applies_to_all_parameters_and_is_not_clipped():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  (got,) = steps_of(
    [zeros], momentum=0.9, weight_decay=0.5, grad_norm_clip=1e-3
  )
  for k, v in PARAMS.items():
    np.testing.assert_allclose(got[k], v * (1 - 0.1 * 0.5), rtol=1e-6)


def test_clip_of_zero_disables_clipping():
  huge = jax.tree.map(lambda x: 1e6 * jnp.ones_like(x), PARAMS)
  (got,) = steps_of([huge], momentum=0.9, weight_decay=0.0, grad_norm_clip=0)
  for k, v in PARAMS.items():
    np.testing.assert_allclose(got[k], v - 1e5, rtol=1e-6)


# AdamW, Muon and adaptive clipping; parameters have the model's names.

BLOCK = "Transformer/encoderblock_0"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
SHAPES = {
  "cls": (1, 1, 4),
  "embedding/kernel": (2, 2, 3, 4),
  "embedding/bias": (4,),
  "Transformer/posembed_input/pos_embedding": (1, 3, 4),
  f"{BLOCK}/LayerNorm_0/scale": (4,),
  f"{ATTENTION}/query/kernel": (4, 2, 2),
  f"{ATTENTION}/query/bias": (2, 2),
  f"{ATTENTION}/out/kernel": (2, 2, 4),
  f"{BLOCK}/MlpBlock_3/Dense_0/kernel": (4, 6),
  f"{BLOCK}/MlpBlock_3/Dense_1/kernel": (6, 4),
  "head/kernel": (4, 3),
  "head/bias": (3,),
}
KERNELS = {k for k in SHAPES if k.endswith("kernel")}
MATRICES = {k: v for k, v in SHAPES.items() if k in KERNELS and BLOCK in k}
# Number of leading input axes of each kernel.
INPUTS = {k: -1 for k in KERNELS} | {f"{ATTENTION}/query/kernel": 1}


def random_tree(seed, size=1.0):
  rng = np.random.default_rng(seed)
  return {k: size * rng.standard_normal(v) for k, v in SHAPES.items()}


def matrix(name, x):
  return x.reshape(np.prod(x.shape[: INPUTS[name]]), -1)


DEFAULTS = dict(
  momentum=0.9, adam_b2=0.99, weight_decay=0.0, grad_norm_clip=0, agc=0.0
)


def last_params(params, gradients, name, **kwargs):
  """Return the flat parameters after updates with learning rates 0.1, ..."""
  kwargs = DEFAULTS | kwargs
  made = optimizers.create(name, lambda count: 0.1 * (count + 1), **kwargs)
  params = flax.traverse_util.unflatten_dict(params, sep="/")
  params = jax.tree.map(jnp.float32, params)
  state = made.init(params)
  for grads in gradients:
    grads = flax.traverse_util.unflatten_dict(grads, sep="/")
    updates, state = jax.jit(made.update)(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return flax.traverse_util.flatten_dict(params, sep="/")


def adam_by_hand(gradients, b1, b2):
  """Yield the directions of one parameter."""
  m = v = 0.0
  for t, g in enumerate(gradients, start=1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def muon_by_hand(gradients, beta):
  """Yield the directions of one matrix [inputs, outputs]."""
  m = 0.0
  for t, g in enumerate(gradients, start=1):
    m = beta * m + (1 - beta) * g
    ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    x = ahead / np.linalg.norm(ahead)
    for _ in range(5):
      xxt = x @ x.T
      x = 3.4445 * x + (-4.7750 * xxt + 2.0315 * xxt @ xxt) @ x
    yield 0.2 * np.sqrt(max(g.shape)) * x


def check_all(got, want):
  assert got.keys() == want.keys()
  for k in want:
    np.testing.assert_allclose(got[k], want[k], rtol=1e-4, atol=1e-5, err_msg=k)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("grad_norm_clip", [0, 1.0])
def test_adamw_and_muon_by_hand(name, grad_norm_clip):
  params = random_tree(0)
  gradients = [random_tree(n, size) for n, size in ((1, 3.0), (2, 0.01))]
  got = last_params(
    params, gradients, name, weight_decay=0.3, grad_norm_clip=grad_norm_clip
  )
  norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in gradients]
  assert norms[1] < 1 < norms[0]
  factor = 1 / norms[0] if grad_norm_clip else 1.0
  want = {}
  for k, p in params.items():
    clipped = [gradients[0][k] * factor, gradients[1][k]]
    if name == "muon" and k in MATRICES:
      directions = muon_by_hand([matrix(k, g) for g in clipped], 0.9)
    else:
      directions = adam_by_hand(clipped, 0.9, 0.99)
    decay = 0.3 if k in KERNELS else 0.0
    for rate, direction in zip((0.1, 0.2), directions, strict=True):
      p = p - rate * (direction.reshape(p.shape) + decay * p)
    want[k] = p
  check_all(got, want)


def test_muon_updates_have_similar_singular_values():
  tall, wide = np.random.default_rng(0).standard_normal((2, 6, 4))
  for g in (tall, wide.T):
    (direction,) = muon_by_hand([g], 0.9)
    values = np.linalg.svd(direction, compute_uv=False)
    assert 0.6 < values.min() / (0.2 * 6**0.5)
    assert values.max() / (0.2 * 6**0.5) < 1.3
    assert np.linalg.cond(g) > 2


def test_adaptive_clipping_by_hand():
  params, grads = random_tree(0), random_tree(1)
  params["cls"] = np.zeros(SHAPES["cls"])
  quiet = f"{ATTENTION}/out/kernel"
  grads[quiet] *= 1e-3
  got = last_params(params, [grads], "sgd", agc=0.1)
  want = {}
  for k, p in params.items():
    g = grads[k]
    if not k.startswith("head"):
      shape = matrix(k, g).shape if k in KERNELS else (g.size, 1)
      w, g = p.reshape(shape), g.reshape(shape)
      for unit in range(shape[1]):
        limit = 0.1 * max(np.linalg.norm(w[:, unit]), 1e-3)
        g[:, unit] *= min(1, limit / np.linalg.norm(g[:, unit]))
    want[k] = p - 0.1 * g.reshape(p.shape)
  check_all(got, want)
  moved = np.linalg.norm(got["cls"])
  assert moved == pytest.approx(0.1 * 0.1 * 1e-3, rel=1e-4)
  np.testing.assert_allclose(  # Too small to be clipped.
    got[quiet], params[quiet] - 0.1 * grads[quiet], rtol=1e-6
  )


def test_the_global_norm_is_computed_after_adaptive_clipping():
  params, grads = random_tree(0), random_tree(1)
  limit = {"agc": 0.1, "grad_norm_clip": 0}
  alone = last_params(params, [grads], "sgd", **limit)
  clipped = {k: (p - alone[k]) / 0.1 for k, p in params.items()}
  norm = np.sqrt(sum(np.square(g).sum() for g in clipped.values()))
  limit["grad_norm_clip"] = norm / 2
  both = last_params(params, [grads], "sgd", **limit)
  for k, p in params.items():
    np.testing.assert_allclose(
      p - both[k], 0.05 * clipped[k], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_scalars_have_their_own_learning_rate(name):
  params, grads = random_tree(0), [random_tree(1), random_tree(2)]
  alpha, pair = "Transformer/encoderblock_0/Cal_0/alpha", "pair"
  params |= {alpha: np.ones(1), pair: np.ones(2)}
  for g in grads:
    g |= {alpha: np.full(1, 0.5), pair: np.full(2, 0.5)}
  usual = last_params(params, grads, name)
  slow = last_params(params, grads, name, lr_mult="scalars:0.25")
  for k in params:
    factor = 0.25 if k == alpha else 1.0
    np.testing.assert_allclose(
      slow[k] - params[k], factor * (usual[k] - params[k]), rtol=1e-5, atol=1e-7
    )
    assert np.abs(usual[k] - params[k]).max() > 1e-3, k
  still = last_params(params, grads, name, lr_mult="scalars:0")
  assert still[alpha] == 1.0


def test_lr_mult_of_zero_freezes_scalars(tiny_config):
  tiny_config.model.update({"norm": "DyT", "residual": "rescalenet"})
  tiny_config.lr_mult = "scalars:0"
  made = experiment.create(tiny_config)
  params = made.init_state().params
  updates, _ = made.optimizer.update(
    jax.tree.map(jnp.ones_like, params), made.optimizer.init(params), params
  )
  updates = flax.traverse_util.flatten_dict(updates, sep="/")
  still = {key for key, x in updates.items() if not np.any(x)}
  params = flax.traverse_util.flatten_dict(params, sep="/")
  assert still == {key for key, x in params.items() if x.size == 1}
  names = {key.split("/")[-2] for key in still}
  assert names == {
    "DyT_0",
    "DyT_2",
    "RescaleNet_0",
    "RescaleNet_2",
    "encoder_norm",
  }


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_singular_values_are_capped_after_the_step(name):
  params, grads = random_tree(0), [random_tree(1)]
  usual = last_params(params, grads, name)
  capped = last_params(params, grads, name, spectral_cap=0.5)
  changed = set()
  for key, want in usual.items():
    if BLOCK in key and key.endswith("kernel"):
      inputs = 1 if key.split("/")[-2] in ("query", "key", "value") else -1
      matrix = want.reshape(math.prod(want.shape[:inputs]), -1)
      left, values, right = np.linalg.svd(np.float64(matrix), False)
      most = 0.5 * (matrix.shape[1] / matrix.shape[0]) ** 0.5
      want = ((left * np.minimum(values, most)) @ right).reshape(want.shape)
      changed.add(values[0] > most)
    np.testing.assert_allclose(capped[key], want, rtol=1e-4, atol=1e-5)
  assert True in changed


def test_the_singular_values_of_frozen_kernels_are_not_capped():
  params, grads = random_tree(0), [random_tree(1)]
  found = last_params(params, grads, "sgd", spectral_cap=0.5, lr_mult="*:0")
  check_all(found, params)


def test_without_adaptive_clipping_sgd_equals_rescalevits():
  own = {"weight_decay": 0.1, "grad_norm_clip": 1.0}
  made = optimizers.create("sgd", lambda count: 0.1, **(DEFAULTS | own))
  sgd = optimizers.sgd(lambda count: 0.1, momentum=0.9, **own)
  states = [jax.tree.structure(x.init(PARAMS)) for x in (made, sgd)]
  assert states[0] == states[1]  # Required to load old checkpoints.


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_the_first_matching_pattern_scales_a_learning_rate(name):
  params, grads = random_tree(0), [random_tree(1), random_tree(2)]
  table = "head/bias:3 head/*:0 */query/*:0.5 */encoderblock_0/*:0.25"
  usual = last_params(params, grads, name)
  scaled = last_params(params, grads, name, lr_mult=table)
  factors = dict.fromkeys(params, 1.0) | {"head/bias": 3.0, "head/kernel": 0.0}
  factors |= {k: 0.5 if "query" in k else 0.25 for k in params if BLOCK in k}
  for k, p in params.items():
    np.testing.assert_allclose(
      scaled[k] - p, factors[k] * (usual[k] - p), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_wd_mult_takes_precedence_over_the_optimizers_choice(name):
  params, zeros = random_tree(0), {k: np.zeros(v) for k, v in SHAPES.items()}
  table = "cls:0.5 head/*:0 kernels:2"
  got = last_params(params, [zeros], name, weight_decay=0.3, wd_mult=table)
  default = {k: 1.0 if name == "sgd" or k in KERNELS else 0.0 for k in params}
  want = default | dict.fromkeys(KERNELS, 2.0)
  want |= {"cls": 0.5, "head/kernel": 0.0, "head/bias": 0.0}
  check_all(got, {k: p * (1 - 0.1 * 0.3 * want[k]) for k, p in params.items()})


def test_layer_decay_by_hand():
  params, grads = random_tree(0), random_tree(1)
  for k in list(params):  # Add a second block.
    if BLOCK in k:
      name = k.replace("encoderblock_0", "encoderblock_1")
      params[name], grads[name] = params[k], grads[k]
  final = "Transformer/encoder_norm/scale"
  params[final], grads[final] = np.ones(4), np.full(4, 0.5)
  got = last_params(
    params, [grads], "sgd", layer_decay=0.5, lr_mult="head/bias:3 kernels:1"
  )

  def factor(k):
    if "encoderblock" in k:
      return 0.5 if "encoderblock_1" in k else 0.25
    after = {"head/kernel": 1.0, "head/bias": 3.0, final: 1.0}
    return after.get(k, 0.125)

  check_all(got, {k: p - 0.1 * factor(k) * grads[k] for k, p in params.items()})


def test_wd_mult_needs_a_weight_decay():
  with pytest.raises(errors.UserError, match="set weight_decay"):
    last_params(random_tree(0), [], "adamw", wd_mult="head/*:2")


@pytest.mark.parametrize("key", ["lr_mult", "wd_mult"])
def test_a_pattern_without_parameters_is_an_error(key):
  message = f"^config: {key}: no parameter 'heads/bias'; did you mean head/bias"
  with pytest.raises(errors.UserError, match=message):
    table = {key: "scalars:2 heads/bias:1"}
    last_params(random_tree(0), [], "adamw", weight_decay=0.1, **table)


def test_updates_by_learning_rate_equal_optaxs():
  rng = np.random.default_rng(0)
  shapes = [(3,), (3,), (4, 2), (2**13 + 1,)]
  updates = [
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in shapes
    for dtype in (jnp.float32, jnp.bfloat16)
  ]
  schedule = optax.linear_schedule(1.0, 1 / 3, 2)
  ours = optimizers.scale_by_learning_rate(schedule)
  theirs = optax.scale_by_learning_rate(schedule)
  state, expected_state = ours.init(updates), theirs.init(updates)
  for _ in range(3):
    found, state = ours.update(updates, state)
    expected, expected_state = theirs.update(updates, expected_state)
    for x, y in zip(found, expected, strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)
  assert state == expected_state


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS[:2])
def test_without_weight_decay_updates_do_not_depend_on_the_parameters(name):
  params = {"kernel": jnp.full((2, 2), jnp.inf)}  # 0 * inf would be NaN.
  settings = DEFAULTS | {"grad_norm_clip": 1.0}
  optimizer = optimizers.create(name, lambda _: 0.1, **settings)
  grads = {"kernel": jnp.ones((2, 2))}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  assert np.isfinite(updates["kernel"]).all()
