"""What a model's tokens attend to: probabilities, rollout, statistics.

Shapes: L blocks, B images, h heads, N tokens, the class token first. Row q of a
map [N, N] holds what query q attends to, and sums to 1.
"""

import dataclasses
import functools
import logging
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rescalevit_jax.analysis import trained_model
from rescalevit_jax.augment import preprocess
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@functools.partial(jax.jit, static_argnames="model")
def probabilities(
  model: nn.Module, variables: dict[str, Any], images: jax.Array
) -> jax.Array:
  """Returns the attention probabilities of all blocks.

  Args:
    model: a `VisionTransformer`.
    variables: its collections `params` and `batch_stats`.
    images: [B, S, S, 3] float32 in [-1, 1].

  Returns:
    [L, B, h, N, N] float32, each row summing to 1.
  """
  _, sown = model.apply(
    variables, images, train=False, mutable=["intermediates"]
  )
  blocks = sown["intermediates"]["Transformer"]
  return jnp.stack(
    [
      blocks[f"encoderblock_{i}"]["MultiHeadDotProductAttention_1"][
        "attention"
      ][0]
      for i in range(model.num_layers)
    ]
  )


def rollout(attention: np.ndarray) -> np.ndarray:
  """Follows attention through all blocks, residual connections included.

  Abnar and Zuidema 2020 (arXiv:2005.00928), section 3: the product of
  (mean over heads + identity) / 2 of all blocks, the last one leftmost.

  Args:
    attention: [L, h, N, N], of one image.

  Returns:
    [N, N]: how much of each input token is in each output token; rows sum to 1.
  """
  maps = attention.mean(axis=1)
  identity = np.eye(maps.shape[-1], dtype=maps.dtype)
  result = identity
  for block in maps:
    result = (block + identity) / 2 @ result
  return result


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Means over images, heads and queries, an entry per block.

  Attributes:
    entropy: [L], -sum p ln p, in nats; ln N where attention is uniform.
    diagonal: [L], the share that a token gives itself; 1 / N where uniform.
    sparsity: [L], Hoyer's (2004, Journal of Machine Learning Research 5):
      (sqrt(N) - 1 / ||p||_2) / (sqrt(N) - 1), from 0 (uniform) to 1 (one token
      gets all).
    tokens: N.
    images: how many the means are of.
  """

  entropy: np.ndarray
  diagonal: np.ndarray
  sparsity: np.ndarray
  tokens: int
  images: int


def statistics(
  model: trained_model.TrainedModel, images: np.ndarray, batch: int = 64
) -> Statistics:
  """Measures the attention of a model on images, each counted once.

  Args:
    model: with its weights.
    images: [M, H, W, 3] uint8.
    batch: images a step.
  """
  batch = min(batch, len(images))
  sums, tokens = 0.0, 0
  start = line = time.monotonic()
  for first in range(0, len(images), batch):
    part = images[first : first + batch]
    counted = np.arange(batch) < len(part)
    part = np.concatenate([part, images[: batch - len(part)]])
    found, tokens = _sums(
      model.model, model.variables, part, counted, model.image_size
    )
    sums += np.asarray(found, np.float64)
    if time.monotonic() - line > _SECONDS_BETWEEN_LINES:
      line = time.monotonic()
      done = min(first + batch, len(images))
      rate = done / (line - start)
      _log.info(
        "attention of %s: image %d of %d  %.1f images/s  ETA %s",
        model.name,
        done,
        len(images),
        rate,
        terminal.duration((len(images) - done) / rate),
      )
  return Statistics(*sums / len(images), int(tokens), len(images))


@functools.partial(jax.jit, static_argnames=("model", "image_size"))
def _sums(model, variables, images, counted, image_size):
  """Sums over the images that count: [3, L], and N."""
  p = probabilities(model, variables, preprocess.prepare(images, image_size))
  n = p.shape[-1]
  entropy = jax.scipy.special.entr(p).sum(-1)
  diagonal = jnp.diagonal(p, axis1=-2, axis2=-1)
  norm = jnp.sqrt(jnp.square(p).sum(-1))
  sparsity = (n**0.5 - 1 / norm) / (n**0.5 - 1)
  means = jnp.stack([x.mean((-2, -1)) for x in (entropy, diagonal, sparsity)])
  return jnp.where(counted, means, 0.0).sum(-1), n
