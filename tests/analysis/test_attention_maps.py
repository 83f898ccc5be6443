"""Attention maps, rollout and statistics."""

import jax
import norm_sets
import numpy as np
import pytest
import tiny_model

from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.augment import preprocess


@pytest.fixture(scope="module")
def images():
  generator = np.random.default_rng(0)
  return generator.integers(0, 256, (7, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("norm", norm_sets.DIFFERENT)
def test_rows_sum_to_one(norm, images):
  model = tiny_model.create(norm)
  maps = attention_maps.collect_probabilities(
    model.model, model.variables, model.inputs(images)
  )
  assert maps.shape == (3, 7, 2, 5, 5)
  np.testing.assert_allclose(np.asarray(maps).sum(-1), 1, atol=1e-6)
  assert np.asarray(maps).std() > 0.01


def test_blocks_are_in_order_beyond_ten(images):
  model = tiny_model.create(num_layers=12)
  attn = model.variables["params"]["Transformer"]["encoderblock_2"]
  attn["MultiHeadDotProductAttention_1"]["query"] = jax.tree.map(
    np.zeros_like, attn["MultiHeadDotProductAttention_1"]["query"]
  )
  maps = np.asarray(
    attention_maps.collect_probabilities(
      model.model, model.variables, model.inputs(images[:1])
    )
  )
  uniform = [bool(np.allclose(block, 1 / 5)) for block in maps]
  assert uniform == [i == 2 for i in range(12)]


def test_rollout_by_hand():
  # Two heads whose mean is [[1, 0], [1/2, 1/2]], then a block that swaps.
  first = np.array([[[1, 0], [1, 0]], [[1, 0], [0, 1]]], np.float32)
  swap = np.array([[[0, 1], [1, 0]]] * 2, np.float32)
  # With the residual: [[1, 0], [1/4, 3/4]] and [[1/2, 1/2], [1/2, 1/2]].
  np.testing.assert_allclose(
    attention_maps.rollout(np.stack([first, swap])),
    [[0.625, 0.375], [0.625, 0.375]],
  )
  np.testing.assert_allclose(
    attention_maps.rollout(np.stack([swap, first])),
    [[0.5, 0.5], [0.5, 0.5]],
  )
  np.testing.assert_allclose(
    attention_maps.rollout(first[None]), [[1, 0], [0.25, 0.75]]
  )


def test_statistics_of_uniform_attention(images):
  model = tiny_model.create()
  model.variables["params"] = jax.tree.map(
    np.zeros_like, model.variables["params"]
  )
  found = attention_maps.statistics(model, images, batch=3)
  np.testing.assert_allclose(found.entropy, [np.log(5)] * 3, rtol=1e-5)
  np.testing.assert_allclose(found.diagonal, [0.2] * 3, rtol=1e-5)
  np.testing.assert_allclose(found.sparsity, [0] * 3, atol=1e-5)
  assert (found.tokens, found.images) == (5, 7)


@pytest.mark.parametrize("batch", [3, 7, 100])
def test_statistics_count_each_image_once(images, batch):
  model = tiny_model.create()
  found = attention_maps.statistics(model, images, batch=batch)
  p = np.asarray(
    attention_maps.collect_probabilities(
      model.model, model.variables, preprocess.prepare(images, 8)
    ),
    np.float64,
  )
  means = (1, 2, 3)
  np.testing.assert_allclose(
    found.entropy, -(p * np.log(p)).sum(-1).mean(means), rtol=1e-4
  )
  np.testing.assert_allclose(
    found.diagonal, np.einsum("lbhii->lbhi", p).mean(means), rtol=1e-4
  )
  hoyer = (5**0.5 - 1 / np.linalg.norm(p, axis=-1)) / (5**0.5 - 1)
  np.testing.assert_allclose(found.sparsity, hoyer.mean(means), rtol=1e-4)
  assert found.images == 7
