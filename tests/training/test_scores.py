"""Scores of a classifier, against hand computations and scikit-learn."""

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from rescalevit_jax.training import scores

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, 200).astype(np.int32)
NAMES = [f"class {i}" for i in range(7)]


def test_scores_equal_scikit_learn():
  found = scores.scores(LOGITS, LABELS, NAMES)
  probabilities = scipy.special.softmax(LOGITS.astype(float), axis=1)
  assert found["examples"] == 200
  assert found["accuracy"] == metrics.accuracy_score(LABELS, LOGITS.argmax(-1))
  assert found["loss"] == pytest.approx(metrics.log_loss(LABELS, probabilities))
  assert found["top5"] == pytest.approx(
    metrics.top_k_accuracy_score(LABELS, LOGITS, k=5)
  )
  confusion = scores.confusion_matrix(LOGITS, LABELS)
  np.testing.assert_array_equal(
    confusion, metrics.confusion_matrix(LABELS, LOGITS.argmax(-1))
  )
  for i, name in enumerate(NAMES):
    row = found["per_class"][name]
    assert row["examples"] == (LABELS == i).sum()
    assert row["accuracy"] == confusion[i, i] / confusion[i].sum()


def test_wilson_interval_against_scipy():
  for successes, trials in [(0, 10), (3, 10), (10, 10), (9863, 10000)]:
    found = scores.wilson_interval(successes, trials)
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(
      0.95, method="wilson"
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_calibration_error_by_hand():
  """Two bins: confidences 0.9 (right), 0.9 (wrong) and 0.6 (right)."""
  logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
  labels = np.array([0, 1, 1])
  by_hand = (abs(1 - 2 * 0.9) + abs(1 - 0.6)) / 3
  found = scores.calibration_error(logits, labels)
  assert found == pytest.approx(by_hand)
  certain = np.array([[1000.0, 0.0], [0.0, 1000.0]])
  assert scores.calibration_error(certain, np.array([0, 1])) == 0
  assert scores.calibration_error(certain, np.array([1, 0])) == 1


def test_few_classes_have_no_top_five():
  assert "top5" not in scores.scores(LOGITS[:, :5], LABELS % 5, NAMES[:5])


def test_a_class_without_examples_has_no_accuracy():
  found = scores.scores(LOGITS, np.zeros(200, np.int32), NAMES)
  assert found["per_class"]["class 3"]["accuracy"] is None
  assert found["per_class"]["class 3"]["interval"] == [0, 1]


def test_equal_logits_count_as_in_argmax():
  logits = np.zeros((2, 8))
  assert scores.top_accuracy(logits, np.array([0, 5]), 5) == 0.5


def test_stale_predictions_are_deleted(tmp_path):
  found = scores.evaluation(np.eye(3, dtype=np.float32), np.arange(3), "abc")
  found.write(tmp_path, save_predictions=True)
  assert (tmp_path / "predictions.npz").exists()
  found.write(tmp_path, save_predictions=False)
  assert not (tmp_path / "predictions.npz").exists()


def test_severities_of_a_corruption_are_averaged_first():
  """A name that ends in a number is one severity of a corruption."""
  logits = np.eye(2, dtype=np.float32)
  right, wrong = (
    scores.scores(logits, np.array(labels), "ab") for labels in ([0, 1], [1, 0])
  )
  suite = {"fog_1": wrong, "fog_2": wrong, "gaussian_blur": right}
  suite |= {"gaussian_noise": right}
  found = scores.of_suite(suite)["mean_corruption_error"]
  assert found == pytest.approx(1 / 3)


def test_a_confusion_matrix_has_a_limit(monkeypatch, tmp_path):
  """A confusion matrix of 21841 classes would take 3.8 GB."""
  labels = np.array([0, 1, 1, 2])
  logits = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]
  found = scores.evaluation(logits, labels, "abc")
  monkeypatch.setattr(scores, "_MOST_CONFUSED", 2)
  found.write(tmp_path, save_predictions=False)
  assert [x.name for x in tmp_path.iterdir()] == ["eval.json"]
  assert found.summary["per_class"]["b"]["accuracy"] == 0.5
