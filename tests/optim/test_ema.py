"""The moving average of the weights against the explicit weighted sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax.optim import ema


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_average_is_the_weighted_mean_of_all_steps(decay):
  values = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
  average = {"x": jnp.full(3, 7.0), "count": jnp.int32(0)}  # Weight 0.
  update = jax.jit(ema.update, static_argnames="decay")
  for t, value in enumerate(values, start=1):
    latest = {"x": jnp.asarray(value), "count": jnp.int32(t)}
    average = update(average, latest, jnp.int32(t), decay)
    weights = decay ** np.arange(t)[::-1]
    want = weights @ values[:t] / weights.sum()
    np.testing.assert_allclose(average["x"], want, rtol=1e-4, atol=1e-5)
    assert average["count"] == t and average["count"].dtype == jnp.int32


def test_small_steps_are_not_lost_to_rounding():
  update = jax.jit(ema.update, static_argnames="decay")
  average = jnp.zeros(1)
  for t in range(1, 11):
    average = update(average, jnp.full(1, float(t)), jnp.int32(t), 0.99999)
  assert average[0] == pytest.approx(5.5, rel=1e-4)
