"""Scores of a classifier, from its logits on a whole split."""

from collections.abc import Sequence
import math
from typing import Any

from jaxtyping import Float, Int
import numpy as np
import scipy.special

_CALIBRATION_BINS = 15
_Z = 1.959963984540054  # Normal quantile of 97.5 %, for 95 % intervals.


def scores(
  logits: Float[np.ndarray, "N C"],
  labels: Int[np.ndarray, " N"],
  class_names: Sequence[str],
) -> dict[str, Any]:
  """Compute everything that result files say of an evaluation.

  Returns:
    `examples`, `accuracy` with `accuracy_interval`, `top5` (with more than five
    classes), `loss`, `calibration_error`, and `per_class`: examples, accuracy
    and interval by class name.
  """
  correct = logits.argmax(-1) == labels
  found = {
    "examples": len(labels),
    "accuracy": float(correct.mean()),
    "accuracy_interval": wilson_interval(int(correct.sum()), len(labels)),
    "loss": cross_entropy(logits, labels),
    "calibration_error": calibration_error(logits, labels),
  }
  if logits.shape[1] > 5:
    found["top5"] = top_accuracy(logits, labels, 5)
  confusion = confusion_matrix(logits, labels)
  found["per_class"] = {
    name: {
      "examples": int(row.sum()),
      "accuracy": float(row[i] / row.sum()) if row.sum() else None,
      "interval": wilson_interval(int(row[i]), int(row.sum())),
    }
    for i, (name, row) in enumerate(zip(class_names, confusion, strict=True))
  }
  return found


def cross_entropy(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> float:
  """Compute the mean negative log-likelihood of the labels, in nats."""
  logits = logits.astype(np.float64)
  true = np.take_along_axis(logits, labels[:, None].astype(int), axis=1)[:, 0]
  return float((scipy.special.logsumexp(logits, axis=1) - true).mean())


def top_accuracy(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], k: int
) -> float:
  """Compute the fraction of examples whose label is among the top k logits.

  Among equal logits the class with the lower number comes first, as in argmax.
  """
  order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
  return float((order == labels[:, None]).any(axis=1).mean())


def calibration_error(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> float:
  """Compute the expected calibration error with 15 bins of equal width.

  Guo et al. 2017 (arXiv:1706.04599), equation 3: |accuracy - confidence| of
  each bin, weighted by its examples.
  """
  probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
  confidence = probabilities.max(axis=1)
  correct = logits.argmax(-1) == labels
  bins = np.ceil(confidence * _CALIBRATION_BINS).astype(int)
  gaps = np.bincount(bins, correct - confidence)
  return float(np.abs(gaps).sum() / len(labels))


def confusion_matrix(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> Int[np.ndarray, "C C"]:
  """Count examples by label (row) and predicted class (column)."""
  classes = logits.shape[1]
  cells = labels.astype(int) * classes + logits.argmax(-1)
  counts = np.bincount(cells, minlength=classes * classes)
  return counts.reshape(classes, classes)


def wilson_interval(successes: int, trials: int) -> list[float]:
  """Compute the 95 % score interval of a proportion (Wilson 1927)."""
  if not trials:
    return [0.0, 1.0]
  p, z2 = successes / trials, _Z**2
  center = (p + z2 / (2 * trials)) / (1 + z2 / trials)
  half = _Z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
  half /= 1 + z2 / trials
  return [max(0.0, center - half), min(1.0, center + half)]
