"""Linear layers with a learned spectral norm (sigma reparametrization)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.models import sigma
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz

X = np.random.default_rng(0).normal(size=(4, 3, 2, 6)).astype(np.float32)


@pytest.mark.parametrize("features, axes", [((2, 5), 1), (7, 2)])
def test_formula_by_hand(features, axes):
  layer = sigma.SigmaLinear(features, axes)
  variables = layer.init(jax.random.key(0), X)
  for _ in range(100):
    _, new = layer.apply(variables, X, True, mutable=["batch_stats"])
    variables = {**variables, **new}
  params = variables["params"]
  params["gamma"] = jnp.array([1.5])
  params["bias"] = params["bias"] + 0.3
  kernel = np.asarray(params["kernel"], np.float64)
  inputs = 6 if axes == 1 else 12
  matrix = kernel.reshape(inputs, -1)
  matrix = 1.5 * matrix / np.linalg.svd(matrix)[1][0]
  want = X.reshape(-1, inputs) @ matrix
  want = want.reshape(
    *X.shape[: 3 if axes == 1 else 2], *np.shape(params["bias"])
  )
  found = layer.apply(variables, X)
  np.testing.assert_allclose(found, want + 0.3, rtol=1e-4, atol=1e-4)


def test_gradient_equals_the_gradient_of_the_largest_singular_value():
  layer = sigma.SigmaLinear(5)
  x = X[0, 0]
  variables = layer.init(jax.random.key(0), x)
  kernel = variables["params"]["kernel"]
  v = jnp.linalg.svd(kernel)[2][0]
  variables["batch_stats"]["singular_vector"] = v
  weights = np.random.default_rng(1).normal(size=(2, 5))

  def ours(kernel):
    params = {**variables["params"], "kernel": kernel}
    return (weights * layer.apply({**variables, "params": params}, x)).sum()

  def formula(kernel):
    largest = jnp.linalg.svd(kernel, compute_uv=False)[0]
    return (weights * (x @ kernel / largest)).sum()

  found, want = jax.grad(ours)(kernel), jax.grad(formula)(kernel)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_only_training_updates_the_vector():
  start = sigma.SigmaLinear(5).init(jax.random.key(0), X)
  v = start["batch_stats"]["singular_vector"]
  for train in (False, True):
    layer = sigma.SigmaLinear(5)
    _, new = layer.apply(start, X, train, mutable=["batch_stats"])
    moved = np.abs(new["batch_stats"]["singular_vector"] - v).max() > 0
    assert moved == train
  # Sixteen iterations are close.
  kernel = start["params"]["kernel"]
  largest = np.linalg.svd(kernel)[1][0]
  assert np.linalg.norm(kernel @ v) == pytest.approx(largest, rel=0.02)


def test_length_of_the_vector_has_no_effect():
  variables = sigma.SigmaLinear(5).init(jax.random.key(0), X)
  want = sigma.SigmaLinear(5).apply(variables, X)
  shorter = jax.tree.map(lambda v: 0.7 * v, variables["batch_stats"])
  found = sigma.SigmaLinear(5).apply({**variables, "batch_stats": shorter}, X)
  np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("file_has_it", [False, True])
def test_loading_other_linear_layers_keeps_logits(file_has_it, tmp_path):
  def logits(variables, sigma_reparam):
    model = models.create(
      "ViT-B_16",
      num_classes=3,
      image_size=8,
      sigma_reparam=sigma_reparam,
      **trees.TINY,
    )
    x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3))
    params, batch_stats = variables
    return model.apply({"params": params, "batch_stats": batch_stats}, x)

  theirs = trees.fresh(sigma_reparam=file_has_it, seed=1)
  npz.save(tmp_path / "a.npz", *theirs)
  ours = trees.fresh(sigma_reparam=not file_has_it, seed=2)
  *loaded, report = load.load(tmp_path / "a.npz", *ours)
  np.testing.assert_allclose(
    logits(loaded, not file_has_it),
    logits(theirs, file_has_it),
    rtol=1e-3,
    atol=1e-4,
  )
  of_layers = {key.rpartition("/")[2] for key in report.derived}
  assert of_layers == (set() if file_has_it else {"gamma", "singular_vector"})
  assert not report.initial
  assert any("plain" in note for note in report.notes) == file_has_it


def test_a_file_without_a_singular_vector_is_rejected(tmp_path):
  arrays = trees.arrays(sigma_reparam=True)
  key = next(key for key in arrays if key.endswith("singular_vector"))
  del arrays[key]
  path = trees.write(tmp_path, arrays)
  with pytest.raises(errors.UserError, match="sigma_reparam.*singular_vector"):
    load.load(path, *trees.fresh())


@pytest.mark.parametrize(
  "leaf, change",
  [
    ("gamma", lambda x: np.broadcast_to(x, (1000, 1, 1))),
    ("gamma", lambda x: np.broadcast_to(x, 16)),
    ("singular_vector", lambda x: x[: x.size // 4]),
    ("singular_vector", lambda x: x[None]),
  ],
)
def test_a_file_with_other_shapes_is_rejected(leaf, change, tmp_path):
  """Shapes are checked before a product that might exhaust memory."""
  arrays = trees.arrays(sigma_reparam=True)
  for key in [key for key in arrays if key.endswith(f"query/{leaf}")]:
    arrays[key] = change(arrays[key])
  path = trees.write(tmp_path, arrays)
  with pytest.raises(errors.UserError, match=rf"query/.*{leaf}.*not \(1,\)"):
    load.load(path, *trees.fresh())


def test_a_kernel_of_zeros_has_no_singular_vector(tmp_path):
  arrays = trees.arrays()
  key = next(key for key in arrays if key.endswith("query/kernel"))
  arrays[key] = np.zeros_like(arrays[key])
  path = trees.write(tmp_path, arrays)
  with pytest.raises(errors.UserError, match="query/kernel is all zeros"):
    load.load(path, *trees.fresh(sigma_reparam=True))
