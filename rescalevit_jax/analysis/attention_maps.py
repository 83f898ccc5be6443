"""Compute the attention of models: probabilities, rollout, statistics.

Dimensions: L blocks, B images, h heads, N tokens, the class token first. Row q
of a map [N, N] is the attention of query q to all tokens, and sums to 1.
"""

import dataclasses
import functools
import logging
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8
import numpy as np

from rescalevit_jax.analysis import trained_model
from rescalevit_jax.augment import preprocess
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0


@functools.partial(jax.jit, static_argnames="model")
def collect_probabilities(
  model: nn.Module,
  variables: dict[str, Any],
  images: Float32[Array, "B S S 3"],
) -> Float32[Array, "L B h N N"]:
  """Return the attention probabilities of all blocks.

  `vit.MultiHeadAttention` computes and sows them.
  """
  _, sown = model.apply(
    variables, images, train=False, mutable=["intermediates"]
  )
  blocks = sown["intermediates"]["Transformer"]
  layer = "MultiHeadDotProductAttention_1"
  return jnp.stack(
    [
      blocks[f"encoderblock_{i}"][layer]["attention"][0]
      for i in range(model.config.num_layers)
    ]
  )


def rollout(
  attention: Float[np.ndarray, "L h N N"],
) -> Float[np.ndarray, "N N"]:
  """Return the share of each input token (column) in each output token (row).

  Attention rollout, Abnar and Zuidema 2020 (arXiv:2005.00928), section 3: the
  product of (mean over heads + identity) / 2 of all blocks, the last block
  leftmost. The identity accounts for residual connections. Rows sum to 1.
  """
  maps = attention.mean(axis=1)
  identity = np.eye(maps.shape[-1], dtype=maps.dtype)
  result = identity
  for block in maps:
    result = (block + identity) / 2 @ result
  return result


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Statistics of each block, averaged over images, heads and queries.

  Attributes:
    entropy: -sum p ln p, in nats; ln N for uniform attention.
    diagonal: attention of a token to itself; 1 / N for uniform attention.
    sparsity: Hoyer's sparsity (2004, Journal of Machine Learning Research 5):
      (sqrt(N) - 1 / ||p||_2) / (sqrt(N) - 1), 0 for uniform attention, 1 if
      one token receives all attention.
    tokens: N.
    images: number of images.
  """

  entropy: Float[np.ndarray, " L"]
  diagonal: Float[np.ndarray, " L"]
  sparsity: Float[np.ndarray, " L"]
  tokens: int
  images: int


def statistics(
  model: trained_model.TrainedModel,
  images: UInt8[np.ndarray, "M H W 3"],
  batch: int = 64,
) -> Statistics:
  """Compute the attention statistics of a model, counting each image once."""
  batch = min(batch, len(images))
  sums, tokens = np.zeros((3, model.model.config.num_layers)), 0
  start = last_log = time.monotonic()
  for first in range(0, len(images), batch):
    part = images[first : first + batch]
    counted = np.arange(batch) < len(part)
    part = np.concatenate([part, images[: batch - len(part)]])
    found, tokens = _sums(
      model.model, model.variables, part, counted, model.image_size
    )
    sums += np.asarray(found, np.float64)
    if time.monotonic() - last_log > _PROGRESS_SECONDS:
      last_log = time.monotonic()
      done = min(first + batch, len(images))
      speed = done / (last_log - start)
      _log.info(
        "attention of %s: image %d of %d  %.1f images/s  ETA %s",
        model.name,
        done,
        len(images),
        speed,
        terminal.duration((len(images) - done) / speed),
      )
  entropy, diagonal, sparsity = sums / len(images)
  return Statistics(entropy, diagonal, sparsity, int(tokens), len(images))


@functools.partial(jax.jit, static_argnames=("model", "image_size"))
def _sums(model, variables, images, counted, image_size):
  """Return the statistics summed over counted images, [3, L], and N."""
  p = collect_probabilities(
    model, variables, preprocess.prepare(images, image_size)
  )
  n = p.shape[-1]
  entropy = jax.scipy.special.entr(p).sum(-1)
  diagonal = jnp.diagonal(p, axis1=-2, axis2=-1)
  norm = jnp.sqrt(jnp.square(p).sum(-1))
  sparsity = (n**0.5 - 1 / norm) / (n**0.5 - 1)
  means = jnp.stack([x.mean((-2, -1)) for x in (entropy, diagonal, sparsity)])
  return jnp.where(counted, means, 0.0).sum(-1), n
