"""Initialization of the parameters.

There are three schemes. `torch` is RescaleViT's, with PyTorch's defaults.
`google` is Google's ViT code's. In `unit`, tokens have variance 1 and linear
layers preserve it. The first two share the class token (0) and the MLP (Xavier
uniform, biases normal 1e-6). All share the norms (scale 1, bias 0).
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Scheme:
  """Initializers of each kind of parameter."""

  patch_kernel: Initializer
  patch_bias: Callable[[int], Initializer]  # Of the fan-in, like the next ones.
  position: Initializer
  attention_kernel: Initializer
  attention_bias: Callable[[int], Initializer]
  head_kernel: Initializer
  head_bias: Callable[[int], Initializer]
  cls: Initializer = nn.initializers.zeros
  mlp_kernel: Initializer = nn.initializers.xavier_uniform()
  mlp_bias: Initializer = nn.initializers.normal(stddev=1e-6)


def _zeros(fan_in):
  del fan_in
  return nn.initializers.zeros


def _uniform(fan_in):
  """U(-b, b) with b = fan_in^(-1/2), PyTorch's default for biases."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


# Variance 1 / (3 fan_in): U(-b, b) with b = fan_in^(-1/2), PyTorch's default of
# Linear and Conv2d.
_TORCH_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Half of a token's variance comes from its position, half from its content.
# Pixels are assumed to be uniform in [-1, 1], with variance 1/3.
_HALF = nn.initializers.normal(stddev=0.5**0.5)
_HALF_OF_PIXELS = nn.initializers.variance_scaling(3 / 2, "fan_in", "normal")

SCHEMES = {
  "torch": Scheme(
    patch_kernel=_TORCH_KERNEL,
    patch_bias=_uniform,
    position=nn.initializers.zeros,
    attention_kernel=_TORCH_KERNEL,
    attention_bias=_uniform,
    head_kernel=_TORCH_KERNEL,
    head_bias=_uniform,
  ),
  "google": Scheme(
    patch_kernel=nn.initializers.lecun_normal(),
    patch_bias=_zeros,
    position=nn.initializers.normal(stddev=0.02),
    attention_kernel=nn.initializers.xavier_uniform(),
    attention_bias=_zeros,
    head_kernel=nn.initializers.zeros,
    head_bias=_zeros,
  ),
  # Linear layers: variance 1 / fan_in (LeCun et al. 1998, section 4.6).
  "unit": Scheme(
    cls=_HALF,
    patch_kernel=_HALF_OF_PIXELS,
    patch_bias=_zeros,
    position=_HALF,
    attention_kernel=nn.initializers.lecun_normal(),
    attention_bias=_zeros,
    head_kernel=nn.initializers.lecun_normal(),
    head_bias=_zeros,
    mlp_kernel=nn.initializers.lecun_normal(),
    mlp_bias=nn.initializers.zeros,
  ),
}
