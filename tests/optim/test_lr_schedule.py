"""The learning-rate schedule against values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax.optim import lr_schedule as lr_schedule_lib


def rates(base_lr, warmup_steps, total_steps, decay_type, steps=None, **kwargs):
  """Return the learning rates of steps 1, 2, ... (optax counts from 0)."""
  lr_schedule = lr_schedule_lib.create(
    base_lr, warmup_steps, total_steps, decay_type, **kwargs
  )
  return np.array(
    [lr_schedule(jnp.int32(n)) for n in range(steps or total_steps)]
  )


def test_linear_schedule_by_hand():
  want = [0.5, 1, 1.5, 2, 1.6, 1.2, 0.8, 0.4, 0]
  np.testing.assert_allclose(rates(2.0, 4, 9, "linear"), want, atol=1e-6)


def test_cosine_schedule_by_hand():
  quarter = 0.5**0.5 / 2  # cos(45 degrees) / 2
  want = [1 / 3, 2 / 3, 1, 0.5 + quarter, 0.5, 0.5 - quarter, 0]
  np.testing.assert_allclose(rates(1.0, 3, 7, "cosine"), want, atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_without_warmup_the_first_step_is_decayed(decay_type):
  got = rates(1.0, 0, 4, decay_type)
  quarter = 0.5**0.5 / 2
  want = {
    "linear": [0.75, 0.5, 0.25, 0],
    "cosine": [0.5 + quarter, 0.5, 0.5 - quarter, 0],
  }
  np.testing.assert_allclose(got, want[decay_type], atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_warmup_over_all_steps_ends_at_base_lr(decay_type):
  got = rates(3.0, 3, 3, decay_type)
  np.testing.assert_allclose(got, [1, 2, 3], atol=1e-6)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_first_rate_is_positive_and_last_is_zero(warmup_steps, decay_type):
  got = rates(0.05, warmup_steps, 20, decay_type, steps=25)
  assert got[0] > 0
  assert got[18] > 0
  np.testing.assert_allclose(got[19:], 0, atol=1e-9)
  assert got.max() <= np.float32(0.05)


@pytest.mark.parametrize(
  "decay_type, decay",
  [
    ("linear", [1.7, 1.4, 1.1, 0.8]),
    ("cosine", [1.4 + 0.6 * 0.5**0.5, 1.4, 1.4 - 0.6 * 0.5**0.5, 0.8]),
    ("sqrt", [1.4, 2 - 1.2 * 0.5**0.5, 2 - 1.2 * 0.75**0.5, 0.8]),
  ],
)
def test_constant_rate_then_decay_to_the_minimum_by_hand(decay_type, decay):
  got = rates(2.0, 2, 9, decay_type, steps=12, decay_steps=4, min_lr=0.8)
  want = [1, 2, 2, 2, 2, *decay, 0.8, 0.8, 0.8]
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_sqrt_decays_right_after_the_warmup_by_default():
  got = rates(1.0, 1, 5, "sqrt")
  want = [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0]
  np.testing.assert_allclose(got, want, atol=1e-6)
