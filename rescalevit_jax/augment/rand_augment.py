"""RandAugment and color jitter, on the device."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt8

from rescalevit_jax.augment import operations

MAX_MAGNITUDE = 10.0
_MAGNITUDE_STD = 0.5
_PROBABILITY = 0.5
_FILL = 128.0


def _enhancement(level, sign, size):
  return jnp.maximum(0.1, 1 + sign * 0.9 * level)


# Arguments by level in [0, 1], sign and image size (height, width).
_ARGUMENTS = {
  "autocontrast": lambda level, sign, size: 0.0,
  "equalize": lambda level, sign, size: 0.0,
  "invert": lambda level, sign, size: 0.0,
  "rotate": lambda level, sign, size: sign * math.radians(30) * level,
  # timm keeps no bit at level 1, which Pillow refuses.
  "posterize": lambda level, sign, size: (
    4 + jnp.minimum(3, jnp.floor(4 * level))
  ),
  "solarize": lambda level, sign, size: 256 - jnp.floor(256 * level),
  "solarize_add": lambda level, sign, size: jnp.floor(110 * level),
  **dict.fromkeys(
    ("color", "contrast", "brightness", "sharpness"), _enhancement
  ),
  **dict.fromkeys(
    ("shear_x", "shear_y"), lambda level, sign, size: sign * 0.3 * level
  ),
  "translate_x": lambda level, sign, size: sign * 0.45 * level * size[1],
  "translate_y": lambda level, sign, size: sign * 0.45 * level * size[0],
}
OPERATIONS = tuple(_ARGUMENTS)


def apply(
  key: Key[Array, ""],
  image: UInt8[Array, "H W 3"],
  num_ops: int,
  magnitude: float,
) -> Float[Array, "H W 3"]:
  """Apply random operations to an image; the result is in [0, 255].

  RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as in timm's
  `rand-m9-mstd0.5-inc1`, with which DeiT and DyT train: each of `num_ops`
  operations, drawn uniformly, is applied with probability 0.5. Its magnitude is
  normal with standard deviation 0.5, within [0, 10]. timm also draws bicubic
  interpolation; here it is bilinear.
  """

  def step(x, key):
    coin_key, operation_key, level_key, sign_key = jax.random.split(key, 4)
    noise = _MAGNITUDE_STD * jax.random.normal(level_key)
    operated = operate(
      x,
      jax.random.randint(operation_key, (), 0, len(OPERATIONS)),
      jnp.clip(magnitude + noise, 0, MAX_MAGNITUDE) / MAX_MAGNITUDE,
      jax.random.rademacher(sign_key, (), jnp.float32),
    )
    coin = jax.random.bernoulli(coin_key, _PROBABILITY)
    return jnp.where(coin, _truncate(operated), x), None

  x = image.astype(jnp.float32)
  return jax.lax.scan(step, x, jax.random.split(key, num_ops))[0]


def operate(
  image: Num[Array, "H W 3"],
  operation: Int[Array, ""],
  level: Float[Array, ""],
  sign: Float[Array, ""],
) -> Float[Array, "H W 3"]:
  """Apply `OPERATIONS[operation]` to integers in [0, 255].

  `level` is the magnitude / 10, and `sign` is -1 or 1, for operations with a
  direction. The result is in [0, 255].
  """
  size = image.shape[:2]
  arguments = {name: f(level, sign, size) for name, f in _ARGUMENTS.items()}
  return operations.operate(image, operation, arguments, _FILL)


def jitter(
  key: Key[Array, ""], image: Num[Array, "H W 3"], strength: float
) -> Float[Array, "H W 3"]:
  """Change brightness, contrast and saturation in random order.

  torchvision's ColorJitter without hue. Each factor is uniform in
  [1 - strength, 1 + strength], with strength in [0, 1].
  """
  order_key, factor_key = jax.random.split(key)
  names = ("brightness", "contrast", "color")
  factors = jax.random.uniform(
    factor_key, (len(names),), minval=1 - strength, maxval=1 + strength
  )

  def step(x, i):
    branches = [operations.COLORS[name] for name in names]
    return _truncate(jax.lax.switch(i, branches, factors[i], x)), None

  order = jax.random.permutation(order_key, len(names))
  return jax.lax.scan(step, image.astype(jnp.float32), order)[0]


def _truncate(x):
  """Return integers as Pillow does; 1e-3 is for rounding errors."""
  return jnp.floor(x + 1e-3)
