"""Classifiers on frozen features, against scikit-learn."""

import numpy as np
import pytest
from sklearn import datasets
from sklearn import linear_model
from sklearn import neighbors

from rescalevit_jax.training import frozen_features


@pytest.fixture(scope="module")
def digits():
  """Return raw pixels as features: 1400 for training, 397 for testing."""
  x, y = datasets.load_digits(return_X_y=True)
  x = x.astype(np.float32)
  return x[:1400], y[:1400], x[1400:], y[1400:]


def test_knn_equals_scikit_learn(digits):
  train, labels, test, _ = digits
  found = frozen_features.knn_logits(train, labels, test, 10)
  peer = neighbors.KNeighborsClassifier(
    20,
    metric="cosine",
    weights=lambda distance: np.exp(-distance / 0.07),
    algorithm="brute",
  ).fit(train, labels)
  votes = np.exp(found)
  np.testing.assert_allclose(
    votes / votes.sum(1, keepdims=True), peer.predict_proba(test), atol=1e-4
  )


@pytest.mark.parametrize("count", [1, 3])
def test_knn_with_fewer_examples_than_neighbors(digits, count):
  train, labels, test, _ = digits
  found = frozen_features.knn_logits(train[:count], labels[:count], test, 10)
  assert set(found.argmax(-1)) <= set(labels[:count])


def test_linear_probe_equals_ridge_regression(digits):
  train, labels, test, _ = digits
  found, penalty = frozen_features.linear_probe_logits(train, labels, test, 10)
  assert penalty in frozen_features.PENALTIES
  mean, std = train.mean(0), train.std(0)
  std[std < 1e-6] = np.inf
  x = (train - mean) / std
  peer = linear_model.Ridge(penalty * len(x)).fit(x, np.eye(10)[labels])
  expected = peer.predict((test - mean) / std)
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_knn_and_linear_probe_classify_digits(digits):
  train, labels, test, expected = digits
  knn = frozen_features.knn_logits(train, labels, test, 10)
  probe, _ = frozen_features.linear_probe_logits(train, labels, test, 10)
  assert (knn.argmax(-1) == expected).mean() > 0.93
  assert (probe.argmax(-1) == expected).mean() > 0.85


def test_constant_features_give_finite_logits(digits):
  train, labels, test, _ = digits
  train, test = np.zeros_like(train), np.zeros_like(test)
  found, _ = frozen_features.linear_probe_logits(train, labels, test, 10)
  assert np.isfinite(found).all()


def test_linear_probe_of_examples_sorted_by_class(digits):
  train, labels, test, expected = digits
  order = np.argsort(labels, kind="stable")
  probe, penalty = frozen_features.linear_probe_logits(
    train[order], labels[order], test, 10
  )
  assert penalty < max(frozen_features.PENALTIES)
  assert (probe.argmax(-1) == expected).mean() > 0.85


def test_a_singular_matrix_is_not_chosen():
  """With duplicate images and random labels, predicting class 0 is best."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(50, 768)).astype(np.float32).repeat(2, 0)
  labels = (rng.random(100) < 0.3).astype(np.int32)
  found, _ = frozen_features.linear_probe_logits(features, labels, features, 2)
  assert np.isfinite(found).all()
