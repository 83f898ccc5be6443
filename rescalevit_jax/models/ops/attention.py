"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), two ways.

The gradient is written out, so that forward-mode differentiation works over it
(`jax.jvp` of `jax.grad`), not without it.

Shapes: B images, N tokens, h heads of d channels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rescalevit_jax import accelerator
from rescalevit_jax.models.ops import cudnn

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Choice:
  """An implementation of attention, and why it was chosen."""

  implementation: str
  reason: str


def choose(dtype: jnp.dtype, head_dim: int) -> Choice:
  """Return the fastest implementation that runs here: 'cudnn' or 'xla'.

  Token counts do not matter: cuDNN takes any without a bias.

  Args:
    dtype: of queries, keys and values.
    head_dim: channels of a head.
  """
  problem = cudnn_problem(dtype, head_dim)
  if problem:
    return Choice("xla", problem)
  return Choice("cudnn", "fused, keeps no probabilities in memory")


def cudnn_problem(dtype: jnp.dtype, head_dim: int) -> str | None:
  """Return the reason why cuDNN's attention cannot run here, or None.

  Devices are asked last, since that starts them.
  """
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN needs bfloat16 or float16, not {dtype.name}"
  if head_dim > 128 or head_dim % 8:
    return (
      f"cuDNN needs heads of at most 128 channels, a multiple of 8, not"
      f" {head_dim}"
    )
  device = accelerator.current()
  if device.platform != "gpu":
    return f"cuDNN needs an NVIDIA GPU, not a {device.platform.upper()}"
  if device.compute_capability < (8, 0):
    major, minor = device.compute_capability
    return (
      "cuDNN needs compute capability 8.0 (Ampere) or newer, not"
      f" {major}.{minor}"
    )
  return None


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, implementation: str
) -> jax.Array:
  """Returns softmax(query key^T / sqrt(d)) value, [B, N, h, d].

  Args:
    query: [B, N, h, d].
    key: likewise.
    value: likewise.
    implementation: 'xla', or 'cudnn' where `cudnn_problem` has none.
  """
  if implementation == "cudnn":
    return cudnn.attend(query, key, value)
  return _attend(query, key, value)


def probabilities(query: jax.Array, key: jax.Array) -> jax.Array:
  """Returns softmax(query key^T / sqrt(d)), [B, h, N, N] float32."""
  return jax.nn.softmax(_scores(query, key))


def _scores(query, key):
  return _product("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)


def _product(subscripts, x, y):
  if accelerator.platform() == "cpu":
    # XLA has not all products of bfloat16 with float32 sums there.
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(query, key, value):
  return _forward(query, key, value)[0]


# Divides the products by the softmax's sum, not the N^2 probabilities. The
# gradient, too, so that no more than the exponentials of [B, h, N, N] is kept:
# with E = exp(S - max S), Z = sum E and Y = E V / Z,
#
#   dV = E^T (dY / Z),  dS = E * ((dY / Z) V^T - sum_d(dY * Y) / Z).
#
# The products come heads first: einsum, asked for [B, N, h, d], transposes the
# small factors instead of the result, which is a fifth slower on a CPU.


def _forward(query, key, value):
  scores = _scores(query, key)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  total = weights.sum(axis=-1).swapaxes(1, 2)[..., None]  # [B, N, h, 1]
  weights = weights.astype(value.dtype)
  y = _product("bhqk,bkhd->bhqd", weights, value).swapaxes(1, 2) / total
  y = y.astype(value.dtype)
  return y, (query, key, value, weights, total, y)


def _backward(residuals, dy):
  query, key, value, weights, total, y = residuals
  dtype = value.dtype
  dy = dy.astype(jnp.float32) / total
  shift = (dy * y).sum(axis=-1).swapaxes(1, 2)[..., None]  # [B, h, N, 1]
  dy = dy.astype(dtype)
  dscores = weights * (_product("bqhd,bkhd->bhqk", dy, value) - shift)
  dscores = (dscores * query.shape[-1] ** -0.5).astype(dtype)
  gradients = (
    _product("bhqk,bkhd->bhqd", dscores, key),
    _product("bhqk,bqhd->bhkd", dscores, query),
    _product("bhqk,bqhd->bhkd", weights, dy),
  )
  return tuple(g.swapaxes(1, 2).astype(dtype) for g in gradients)


_attend.defvjp(_forward, _backward)
