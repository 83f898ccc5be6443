"""Scores of a classifier, from its logits on a whole split."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import re
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import csv_text

_CALIBRATION_BINS = 15
_MOST_CONFUSED = 2000  # Classes of a confusion matrix: an 8 MB file.
_Z = 1.959963984540054  # Normal quantile of 97.5 %, for 95 % intervals.


def scores(
  logits: Float[np.ndarray, "N C"],
  labels: Int[np.ndarray, " N"],
  class_names: Sequence[str],
) -> dict[str, Any]:
  """Compute the scores of an evaluation.

  Returns:
    `examples`, `accuracy` with `accuracy_interval`, `top5` (with more than five
    classes), `loss`, `calibration_error`, and `per_class`: examples, accuracy
    and interval by class name.
  """
  found: dict[str, Any] = {
    "examples": len(labels),
    **accuracy(logits, labels),
    "loss": cross_entropy(logits, labels),
    "calibration_error": calibration_error(logits, labels),
  }
  if logits.shape[1] > 5:
    found["top5"] = top_accuracy(logits, labels, 5)
  classes = logits.shape[1]
  examples = np.bincount(labels, minlength=classes).tolist()
  correct = labels[logits.argmax(-1) == labels]
  corrects = np.bincount(correct, minlength=classes).tolist()
  found["per_class"] = {
    name: {
      "examples": n,
      "accuracy": k / n if n else None,
      "interval": wilson_interval(k, n),
    }
    for name, n, k in zip(class_names, examples, corrects, strict=True)
  }
  return found


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation on one dataset."""

  summary: dict[str, Any]  # The content of eval.json.
  class_names: Sequence[str]
  logits: Float[np.ndarray, "N C"]
  labels: Int[np.ndarray, " N"]

  def write(self, workdir: pathlib.Path, save_predictions: bool) -> None:
    """Write eval.json, confusion.csv and, if asked for, predictions.npz.

    Above 2000 classes there is no confusion.csv. A predictions.npz of another
    evaluation is deleted.
    """
    atomic_file.write_json(workdir / folder.EVALUATION, self.summary)
    if len(self.class_names) <= _MOST_CONFUSED:
      counts = confusion_matrix(self.logits, self.labels)
      rows = [
        [name, *row] for name, row in zip(self.class_names, counts, strict=True)
      ]
      table = csv_text.table([["label", *self.class_names], *rows])
      atomic_file.write(workdir / folder.CONFUSION, table)
    if save_predictions:
      with atomic_file.replacing(workdir / folder.PREDICTIONS) as f:
        np.savez(f, logits=self.logits, labels=self.labels)
    else:
      (workdir / folder.PREDICTIONS).unlink(missing_ok=True)


def of_suite(summaries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
  """Return the eval.json of several datasets, such as corruptions of one.

  The mean corruption error averages first over the severities of a corruption
  (names that end in _1, _2, ...), then over corruptions.
  """
  by_corruption: dict[str, list[float]] = {}
  for name, one in summaries.items():
    corruption = re.sub(r"_\d+$", "", name)
    by_corruption.setdefault(corruption, []).append(1 - one["accuracy"])
  means = [sum(x) / len(x) for x in by_corruption.values()]
  accuracies = [x["accuracy"] for x in summaries.values()]
  return {
    "mean_corruption_error": sum(means) / len(means),
    "mean_accuracy": sum(accuracies) / len(accuracies),
    "datasets": dict(summaries),
  }


def evaluation(
  logits: Float[np.ndarray, "N C"],
  labels: Int[np.ndarray, " N"],
  class_names: Sequence[str],
  **info: Any,
) -> Evaluation:
  """Score the logits of a dataset; eval.json starts with `info`."""
  if not np.isfinite(logits).all():
    raise errors.UserError(
      f"{info.get('weights', 'weights')}: the logits of"
      f" {int((~np.isfinite(logits)).any(1).sum())} images are not finite;"
      " choose other weights, or dtype=float32"
    )
  summary = info | scores(logits, labels, class_names)
  return Evaluation(summary, class_names, logits, labels)


def accuracy(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> dict[str, Any]:
  """Compute the accuracy and its 95 % interval."""
  correct = logits.argmax(-1) == labels
  return {
    "accuracy": float(correct.mean()),
    "accuracy_interval": wilson_interval(int(correct.sum()), len(labels)),
  }


def cross_entropy(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> float:
  """Compute the mean negative log-likelihood of the labels, in nats."""
  log_probabilities = _log_softmax(logits)
  return -float(log_probabilities[np.arange(len(labels)), labels].mean())


def top_accuracy(
  logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], k: int
) -> float:
  """Compute the fraction of examples whose label is among the top k logits.

  Ties go to the lower class index, as in argmax.
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
  confidence = np.exp(_log_softmax(logits)).max(axis=1)
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


def wilson_interval(successes: float, trials: int) -> list[float]:
  """Compute the 95 % score interval of a proportion (Wilson 1927).

  With several runs on the same trials, `successes` is their mean.
  """
  if not trials:
    return [0.0, 1.0]
  p, z2 = successes / trials, _Z**2
  center = (p + z2 / (2 * trials)) / (1 + z2 / trials)
  half = _Z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
  half /= 1 + z2 / trials
  return [max(0.0, center - half), min(1.0, center + half)]


def _log_softmax(logits):
  logits = logits.astype(np.float64)
  logits = logits - logits.max(axis=1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
