"""The schedule and SGD against arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import optimizer


def rates(base_lr, warmup_steps, total_steps, decay_type, steps=None):
  """Returns the rates of steps 1, 2, ..., as the optimizer asks for them."""
  rate = optimizer.schedule(base_lr, warmup_steps, total_steps, decay_type)
  return np.array([rate(jnp.int32(n)) for n in range(steps or total_steps)])


def test_linear_schedule_by_hand():
  want = [0.5, 1, 1.5, 2, 1.6, 1.2, 0.8, 0.4, 0]
  np.testing.assert_allclose(rates(2.0, 4, 9, "linear"), want, atol=1e-6)


def test_cosine_schedule_by_hand():
  quarter = 0.5**0.5 / 2  # cos(45 degrees) / 2
  want = [1 / 3, 2 / 3, 1, 0.5 + quarter, 0.5, 0.5 - quarter, 0]
  np.testing.assert_allclose(rates(1.0, 3, 7, "cosine"), want, atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_without_warmup_the_first_step_has_decayed_already(decay_type):
  got = rates(1.0, 0, 4, decay_type)
  quarter = 0.5**0.5 / 2
  want = {
    "linear": [0.75, 0.5, 0.25, 0],
    "cosine": [0.5 + quarter, 0.5, 0.5 - quarter, 0],
  }
  np.testing.assert_allclose(got, want[decay_type], atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_warmup_of_all_steps_ends_at_the_base_rate(decay_type):
  got = rates(3.0, 3, 3, decay_type)
  np.testing.assert_allclose(got, [1, 2, 3], atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_first_step_moves_and_last_does_not(warmup_steps, decay_type):
  got = rates(0.05, warmup_steps, 20, decay_type, steps=25)
  assert got[0] > 0
  assert got[18] > 0
  np.testing.assert_allclose(got[19:], 0, atol=1e-9)
  assert got.max() <= np.float32(0.05)


PARAMS = {
  "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
  "bias": jnp.array([4.0, -1.0]),
  "scale": jnp.array([2.0]),
  "cls": jnp.array([[[-3.0, 1.0]]]),
}


def steps_of(gradients, **kwargs):
  """Returns the parameters after each update with the rates 0.1, 0.2, ..."""
  sgd = optimizer.sgd(lambda count: 0.1 * (count + 1), **kwargs)
  params, state = PARAMS, sgd.init(PARAMS)
  for grads in gradients:
    updates, state = jax.jit(sgd.update)(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield params


def steps_by_hand(gradients, momentum, weight_decay, grad_norm_clip):
  """The same in plain NumPy, one line a rule."""
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
    (0.9, 0.0, 1.0),  # Clips the first and third gradient, not the second.
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


def test_weight_decay_holds_for_every_parameter_and_is_not_clipped():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  (got,) = steps_of(
    [zeros], momentum=0.9, weight_decay=0.5, grad_norm_clip=1e-3
  )
  for k, v in PARAMS.items():
    np.testing.assert_allclose(got[k], v * (1 - 0.1 * 0.5), rtol=1e-6)


def test_clip_of_zero_is_none():
  huge = jax.tree.map(lambda x: 1e6 * jnp.ones_like(x), PARAMS)
  (got,) = steps_of([huge], momentum=0.9, weight_decay=0.0, grad_norm_clip=0)
  for k, v in PARAMS.items():
    np.testing.assert_allclose(got[k], v - 1e5, rtol=1e-6)
