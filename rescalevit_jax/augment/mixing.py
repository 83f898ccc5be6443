"""Label smoothing, mixup and CutMix, inside the jitted training step.

They follow the augmentation of single images.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key
import numpy as np

_QUANTILES = 4096


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Settings: the config keys `label_smoothing`, `mixup` and `cutmix`.

  The last two are the alpha of Beta(alpha, alpha); 0 is off. If both are on,
  each image gets one of them, with equal probability, as in timm.
  """

  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0


NOTHING = Mixing()


def mix(
  keys: Key[Array, " B"],
  images: Float[Array, "B S S 3"],
  labels: Int32[Array, " B"],
  num_classes: int,
  mixing: Mixing,
) -> tuple[Float[Array, "B S S 3"], Int32[Array, " B"] | Float[Array, "B C"]]:
  """Mix each image and label with the previous one in the batch.

  Batches are in random order, so the previous image is a random one. Devices
  exchange one image each. Each row of the targets sums to 1. If `mixing`
  is `NOTHING`, images and labels are returned as they are.
  """
  if mixing == NOTHING:
    return images, labels
  # Label smoothing: Szegedy et al., arXiv:1512.00567, section 7.
  smoothing = mixing.label_smoothing
  targets = (1 - smoothing) * jax.nn.one_hot(labels, num_classes)
  targets += smoothing / num_classes
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


def weights(
  key: Key[Array, ""], size: int, mixing: Mixing
) -> Float[Array, "S S"]:
  """Sample the weight of an image's own value for each pixel."""
  coin_key, mixup_key, cutmix_key = jax.random.split(key, 3)
  samples = []
  if mixing.mixup:
    # Zhang et al. 2018 (arXiv:1710.09412), section 2, with a sample per image.
    samples.append(jnp.full((size, size), random_beta(mixup_key, mixing.mixup)))
  if mixing.cutmix:
    samples.append(cutmix_weights(cutmix_key, size, mixing.cutmix))
  if len(samples) == 1:
    return samples[0]
  mixup, cutmix = samples
  return jnp.where(jax.random.bernoulli(coin_key), mixup, cutmix)


def cutmix_weights(
  key: Key[Array, ""], size: int, alpha: float
) -> Float[Array, "S S"]:
  """Sample the weights of CutMix: 0 in a box, 1 elsewhere.

  Yun et al. 2019 (arXiv:1905.04899), section 3.1: the edge of the box is
  S sqrt(1 - lambda), with lambda drawn from Beta(alpha, alpha). Its center is
  uniform in the image. As in their code, the box is clipped to the image.
  """
  lambda_key, center_key = jax.random.split(key)
  edge = size * jnp.sqrt(1 - random_beta(lambda_key, alpha))
  center = jax.random.uniform(center_key, (2, 1), maxval=size)
  rows, columns = jnp.abs(jnp.arange(size) + 0.5 - center) < edge / 2
  return jnp.where(rows[:, None] & columns, 0.0, 1.0)


def random_beta(key: Key[Array, ""], alpha: float) -> Float[Array, ""]:
  """Sample from Beta(alpha, alpha) by interpolating tabulated quantiles.

  `jax.random.beta` uses rejection sampling, whose loop would have to
  synchronize all devices.
  """
  # A slow import, needed with mixing only.
  from scipy import special

  table = special.betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1))
  table = jnp.asarray(table, jnp.float32)
  position = _QUANTILES * jax.random.uniform(key)
  i = position.astype(jnp.int32)
  return table[i] + (position - i) * (table[i + 1] - table[i])
