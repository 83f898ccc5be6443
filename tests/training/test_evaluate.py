"""Every example counts once."""

import jax
import numpy as np
import optax
import pytest

from rescalevit_jax import models
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import dataset
from rescalevit_jax.data import loader
from rescalevit_jax.distributed import sharding
from rescalevit_jax.training import evaluate


@pytest.fixture(scope="module")
def setting():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (23, 8, 8, 3)).astype(np.uint8)
  labels = rng.integers(0, 4, 23).astype(np.int32)
  model = models.create(
    "ViT-XS_2",
    num_classes=4,
    norm="BN",
    image_size=8,
    patch_size=4,
    hidden_size=8,
    mlp_dim=16,
    num_heads=2,
    num_layers=1,
  )
  x = preprocess.prepare(images, 8)
  variables = model.init(jax.random.key(0), x, train=False)
  return model, variables, images, labels, model.apply(variables, x)


@pytest.mark.parametrize("batch", [1, 5, 8, 22, 23, 24, 1000])
def test_any_batch_counts_every_example_once(setting, batch):
  model, variables, images, labels, logits = setting
  mesh = sharding.create_mesh()
  result = evaluate.Evaluator(
    model,
    loader.Loader(dataset.Split(images, labels), mesh),
    image_size=8,
    batch=batch,
    mesh=mesh,
  )(variables["params"], variables["batch_stats"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert result.examples == 23
  assert result.accuracy == (logits.argmax(-1) == labels).sum() / 23
  np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-6)


def test_it_stops_when_asked(setting):
  model, variables, images, labels, _ = setting
  mesh = sharding.create_mesh()
  evaluator = evaluate.Evaluator(
    model,
    loader.Loader(dataset.Split(images, labels), mesh),
    image_size=8,
    batch=5,
    mesh=mesh,
  )
  asked = iter([False, False, True])
  assert (
    evaluator(
      variables["params"], variables["batch_stats"], lambda: next(asked)
    )
    is None
  )
