"""Softer labels and mixed images: label smoothing, mixup and CutMix.

On the device, inside the jitted step, after the augmentation of each image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_QUANTILES = 4096


@dataclasses.dataclass(frozen=True)
class Mixing:
  """What training does to labels, and to images together with theirs.

  Attributes:
    label_smoothing: the share of a label that all classes have alike.
    mixup: alpha of mixup's Beta(alpha, alpha); 0: none.
    cutmix: the same of CutMix; if both are on, each image draws one of them,
      with even chances (as timm does).
  """

  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0


NOTHING = Mixing()


def mix(
  keys: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  num_classes: int,
  mixing: Mixing,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image, and its label, with the one before it in the batch.

  Which is a random one, as the batch is in random order; devices have to send
  each other one image.

  Args:
    keys: [B] PRNG keys, one an image.
    images: [B, S, S, 3] float32.
    labels: [B] int32.
    num_classes: C.
    mixing: what to do.

  Returns:
    Images [B, S, S, 3] and targets [B, C], float32; each row sums to 1. If
    nothing is to be done: images and labels as they were.
  """
  if mixing == NOTHING:
    return images, labels
  targets = smooth(labels, num_classes, mixing.label_smoothing)
  if mixing.mixup or mixing.cutmix:
    own = jax.vmap(lambda key: weights(key, images.shape[1], mixing))(keys)
    images, targets = (
      w * x + (1 - w) * jnp.roll(x, 1, axis=0)
      for w, x in (
        (own[..., None], images),
        (own.mean((1, 2))[:, None], targets),
      )
    )
  return images, targets


def smooth(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
  """Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7).

  Args:
    labels: [B] int32.
    num_classes: C.
    smoothing: s in [0, 1).

  Returns:
    [B, C] float32: 1 - s + s / C for the label, s / C for the others.
  """
  return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + (
    smoothing / num_classes
  )


def weights(key: jax.Array, size: int, mixing: Mixing) -> jax.Array:
  """Draws how much of its own each pixel of an image keeps: [S, S] float32."""
  coin_key, mixup_key, cutmix_key = jax.random.split(key, 3)
  drawn = []
  if mixing.mixup:
    drawn.append(mixup_weights(mixup_key, size, mixing.mixup))
  if mixing.cutmix:
    drawn.append(cutmix_weights(cutmix_key, size, mixing.cutmix))
  if len(drawn) == 1:
    return drawn[0]
  return jnp.where(jax.random.bernoulli(coin_key), *drawn)


def mixup_weights(key: jax.Array, size: int, alpha: float) -> jax.Array:
  """All pixels keep a share of Beta(alpha, alpha): [S, S].

  Zhang et al. 2018 (arXiv:1710.09412), section 2; each image draws its own.
  """
  return jnp.full((size, size), random_beta(key, alpha))


def cutmix_weights(key: jax.Array, size: int, alpha: float) -> jax.Array:
  """Pixels of a box keep nothing, the others everything: [S, S].

  Yun et al. 2019 (arXiv:1905.04899), section 3.1: the box has the edge
  S sqrt(1 - share), with a share of Beta(alpha, alpha), and its centre anywhere
  in the image. As in their code, what of it is outside does not count.
  """
  share_key, centre_key = jax.random.split(key)
  edge = size * jnp.sqrt(1 - random_beta(share_key, alpha))
  centre = jax.random.uniform(centre_key, (2, 1), maxval=size)
  rows, columns = jnp.abs(jnp.arange(size) + 0.5 - centre) < edge / 2
  return jnp.where(rows[:, None] & columns, 0.0, 1.0)


def random_beta(key: jax.Array, alpha: float) -> jax.Array:
  """Draws from Beta(alpha, alpha): [] float32.

  Between tabulated quantiles: `jax.random.beta` tries until it succeeds, in
  loops of which several devices would have to agree on the end.
  """
  from scipy import (
    special,
  )  # Slow to import; runs without mixing do not need it.

  table = special.betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1))
  table = jnp.asarray(table, jnp.float32)
  place = _QUANTILES * jax.random.uniform(key)
  i = place.astype(jnp.int32)
  return table[i] + (place - i) * (table[i + 1] - table[i])
