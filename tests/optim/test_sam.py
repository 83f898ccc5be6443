"""SAM's ascent by hand; the step is tested in training/test_train_step.py."""

import jax.numpy as jnp
import numpy as np

from rescalevit_jax.optim import sam


def test_ascent_has_length_rho_along_the_global_gradient():
  params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
  grads = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([[2.0]])}  # Norm 3.
  got = sam.ascend(params, grads, 0.6)
  np.testing.assert_allclose(got["a"], [1.4, 1.8], rtol=1e-6)
  np.testing.assert_allclose(got["b"], [[3.4]], rtol=1e-6)
  still = sam.ascend(params, {k: 0 * g for k, g in grads.items()}, 0.6)
  np.testing.assert_array_equal(still["a"], params["a"])
