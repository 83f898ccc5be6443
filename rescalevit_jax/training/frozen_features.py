"""Classifiers on frozen features: k nearest neighbors and a linear probe.

Both judge a representation without training the model, in closed form and on
the device.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from rescalevit_jax.data import index_shuffle

NEIGHBORS = 20
TEMPERATURE = 0.07
# Ridge penalties, relative to the number of training examples; the features
# have unit variance.
PENALTIES = tuple(10.0**n for n in range(-7, 2))
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_CHUNK = 1024  # Test examples compared with all training examples at a time.
_VALIDATION = 0.1  # Fraction of the training examples that select the penalty.


def knn_logits(
  train: Float[np.ndarray, "N D"],
  labels: Int[np.ndarray, " N"],
  test: Float[np.ndarray, "M D"],
  num_classes: int,
) -> Float[np.ndarray, "M C"]:
  """Compute the votes of the 20 nearest training features.

  Wu et al. 2018 (arXiv:1805.01978), section 3.4, with the constants of DINO
  (arXiv:2104.14294): a neighbor votes with exp(cosine similarity / 0.07).

  Returns:
    Logarithms of the votes; -inf for classes without one.
  """
  k = min(NEIGHBORS, len(train))
  keys = _normalize(jnp.asarray(train, jnp.float32))
  classes = jnp.asarray(labels)

  @jax.jit
  def vote(queries):
    similarity = _matmul(_normalize(queries), keys.T)
    nearest, indices = jax.lax.top_k(similarity, k)
    weights = jax.nn.one_hot(classes[indices], num_classes)
    # Of the largest similarity 1, to stay in float32's range.
    weights *= jnp.exp((nearest - 1) / TEMPERATURE)[..., None]
    return jnp.log(weights.sum(1))

  return _in_chunks(vote, test)


def linear_probe_logits(
  train: Float[np.ndarray, "N D"],
  labels: Int[np.ndarray, " N"],
  test: Float[np.ndarray, "M D"],
  num_classes: int,
) -> tuple[Float[np.ndarray, "M C"], float]:
  """Fit a ridge regression to one-hot labels and apply it.

  A random tenth of the training examples selects the penalty among `PENALTIES`.
  Then the weights are fitted to all training examples.

  Returns:
    The regression's outputs for the test features, and the relative penalty.
  """
  mean, std = train.mean(0), train.std(0)
  std = np.where(std > 1e-6, std, np.inf)  # Ignores constant features.
  train, test = ((x - mean) / std for x in (train, test))
  targets = np.eye(num_classes, dtype=np.float32)[labels]
  # Both parts need an example.
  count = min(max(1, round(len(train) * (1 - _VALIDATION))), len(train) - 1)
  order = index_shuffle.shuffle(np.arange(len(train)), len(train), 0, 0)
  fit, held_out = np.sort(order[:count]), np.sort(order[count:])
  fit_features, held_out_features = train[fit], train[held_out]
  best = (-1.0, PENALTIES[-1])
  for penalty in PENALTIES:
    weights, bias = _ridge(fit_features, targets[fit], penalty)
    if not np.isfinite(weights).all():
      continue  # The matrix is singular in float32; it needs a larger penalty.
    predicted = (held_out_features @ weights + bias).argmax(-1)
    accuracy = float((predicted == labels[held_out]).mean())
    best = max(best, (accuracy, penalty))
  weights, bias = _ridge(train, targets, best[1])
  apply = jax.jit(lambda x: _matmul(x, weights) + bias)
  return _in_chunks(apply, test), best[1]


@jax.jit
def _gram(features, targets):
  """Compute means and centered products of features and targets."""
  mean, target_mean = features.mean(0), targets.mean(0)
  centered = features - mean
  products = _matmul(centered.T, targets - target_mean)
  return mean, target_mean, _matmul(centered.T, centered), products


def _ridge(features, targets, penalty):
  mean, target_mean, gram, products = _gram(
    jnp.asarray(features, jnp.float32), jnp.asarray(targets)
  )
  ridge = penalty * len(features) * jnp.eye(len(gram))
  weights = jax.scipy.linalg.solve(gram + ridge, products, assume_a="pos")
  return np.asarray(weights), np.asarray(target_mean - mean @ weights)


def _normalize(x: Float[Array, "N D"]) -> Float[Array, "N D"]:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _in_chunks(function, x):
  """Apply a compiled function to chunks of one size; the last is padded."""
  chunk = min(_CHUNK, len(x))
  results = []
  for start in range(0, len(x), chunk):
    part = np.asarray(x[start : start + chunk], np.float32)
    padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
    results.append(np.asarray(function(padded))[: len(part)])
  return np.concatenate(results)
