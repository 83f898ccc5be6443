"""TrivialAugment (Müller & Hutter 2021, arXiv:2103.10158), on the device.

Each image gets one operation of uniform strength, drawn uniformly from the
paper's "wide" search space.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from rescalevit_jax.augment import operations

_STRENGTHS = 31
# The wide search space: arguments by strength and sign.
_ARGUMENTS = {
  "identity": lambda strength, sign: 0.0,
  **dict.fromkeys(
    ("shear_x", "shear_y"), lambda strength, sign: 0.99 * (sign * strength)
  ),
  **dict.fromkeys(
    ("translate_x", "translate_y"),
    lambda strength, sign: 32.0 * (sign * strength),
  ),
  "rotate": lambda strength, sign: math.radians(135) * (sign * strength),
  **dict.fromkeys(
    ("brightness", "color", "contrast", "sharpness"),
    lambda strength, sign: 1 + 0.99 * sign * strength,
  ),
  "posterize": lambda strength, sign: jnp.round(6 * strength),
  "solarize": lambda strength, sign: 255 * (1 - strength),
  "autocontrast": lambda strength, sign: 0.0,
  "equalize": lambda strength, sign: 0.0,
}
OPERATIONS = tuple(_ARGUMENTS)


def apply(
  key: Key[Array, ""], image: UInt8[Array, "H W 3"]
) -> Float[Array, "H W 3"]:
  """Apply a random operation to an image; the result is in [0, 255]."""
  operation_key, strength_key, sign_key = jax.random.split(key, 3)
  return operate(
    image,
    jax.random.randint(operation_key, (), 0, len(OPERATIONS)),
    jax.random.randint(strength_key, (), 0, _STRENGTHS) / (_STRENGTHS - 1),
    jax.random.rademacher(sign_key, (), jnp.float32),
  )


def operate(
  image: UInt8[Array, "H W 3"],
  operation: Int[Array, ""],
  strength: Float[Array, ""],
  sign: Float[Array, ""],
) -> Float[Array, "H W 3"]:
  """Apply `OPERATIONS[operation]` with a strength in [0, 1].

  `sign` is -1 or 1, for operations with a direction. The result is in [0, 255].
  """
  arguments = {name: f(strength, sign) for name, f in _ARGUMENTS.items()}
  return operations.operate(image, operation, arguments)
