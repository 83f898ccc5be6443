"""Linear layers and hand-written gradients, compared with plain ones."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax.models import linear
from rescalevit_jax.models.ops import gradients

X = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))


@pytest.mark.parametrize("bias_in_product", [False, True])
@pytest.mark.parametrize("features, axes", [(6, 1), ((3, 2), 1), (6, 2)])
def test_linear_equals_dense_general(features, axes, bias_in_product):
  ours = linear.Linear(
    features,
    axes,
    bias_init=nn.initializers.normal(),
    bias_in_product=bias_in_product,
  )
  plain = nn.DenseGeneral(
    features,
    axis=tuple(range(-axes, 0)),
    bias_init=nn.initializers.normal(),
  )
  variables = ours.init(jax.random.key(0), X)
  jax.tree.map(
    np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), X)
  )

  def loss(layer, variables, x):
    return jnp.sin(layer.apply(variables, x)).sum()

  found, want = (
    jax.value_and_grad(loss, (1, 2))(layer, variables, X)
    for layer in (ours, plain)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    found,
    want,
  )


def test_fan_out_adds_gradients():
  def loss(x):
    return sum(i * jnp.sum(y**2) for i, y in enumerate(gradients.fan_out(x)))

  np.testing.assert_allclose(jax.grad(loss)(X), 2 * 3 * X, rtol=1e-6)


def test_add_to_batch_sums_the_gradient_over_the_batch():
  y = jax.random.normal(jax.random.key(2), X.shape[1:])
  weights = jax.random.normal(jax.random.key(3), X.shape)

  def loss(add, x, y):
    return (weights * jnp.sin(add(x, y))).sum()

  found, want = (
    jax.value_and_grad(loss, (1, 2))(add, X, y)
    for add in (gradients.add_to_batch, jnp.add)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    found,
    want,
  )


def test_a_bias_gradient_is_summed_in_float32():
  x = jnp.zeros((4096, 1), jnp.bfloat16)

  def loss(bias):
    return gradients.add_bias(x, bias).astype(jnp.float32).sum()

  # bfloat16 has no number between 256 and 258.
  assert jax.grad(loss)(jnp.zeros(1)) == 4096


def test_gradients_are_differentiable():
  def loss(x):
    y, z, _ = gradients.fan_out(gradients.add_to_batch(x, x[0]))
    flat = gradients.add_bias(y.reshape(-1, 4), z[0, 0, 0])
    return (flat**3).sum()

  direction = jax.random.normal(jax.random.key(4), X.shape)
  found = jax.jvp(jax.grad(loss), (X,), (direction,))[1]
  assert found.shape == X.shape and np.isfinite(found).all()
