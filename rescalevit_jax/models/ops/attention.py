"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), by XLA or cuDNN.

The gradient is written by hand. XLA's version supports forward-mode
differentiation of its gradient (`jax.jvp` of `jax.grad`), but not of its value.

Axes: B images, M queries, N tokens, h heads of d channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rescalevit_jax.models.ops import cudnn
from rescalevit_jax.runtime import accelerator

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def cudnn_problem(
  dtype: jnp.dtype, head_dim: int, logit_cap: float | None = None
) -> str | None:
  """Return the reason why cuDNN's attention cannot run here, or None.

  Any number of tokens is supported, because there is no bias. The device is
  checked last, because the check initializes JAX's devices.
  """
  if logit_cap is not None:
    return "cuDNN cannot bound the logits (model.logit_cap)"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN needs bfloat16 or float16, not {dtype.name}"
  if head_dim > 128 or head_dim % 8:
    return (
      f"cuDNN needs heads of at most 128 channels, a multiple of 8, not"
      f" {head_dim}"
    )
  device = accelerator.current()
  if device.platform != "gpu" or device.compute_capability == (0, 0):
    return f"cuDNN needs an NVIDIA GPU, not this {device.platform.upper()}"
  if device.compute_capability < (8, 0):
    major, minor = device.compute_capability
    return (
      "cuDNN needs compute capability 8.0 (Ampere) or newer, not"
      f" {major}.{minor}"
    )
  return None


def attend(
  query: Float[Array, "B M h d"],
  key: Float[Array, "B N h d"],
  value: Float[Array, "B N h d"],
  implementation: str,
  logit_cap: float | None = None,
) -> Float[Array, "B M h d"]:
  """Return softmax(query key^T / sqrt(d)) value.

  The implementation is 'xla', or 'cudnn' if `cudnn_problem` returns None. For
  the logit cap, see `probabilities`.
  """
  if logit_cap is not None:
    weights = probabilities(query, key, logit_cap).astype(value.dtype)
    return _product("bhqk,bkhd->bqhd", weights, value, value.dtype)
  if implementation == "cudnn" and query.shape == key.shape:
    return cudnn.attend(query, key, value)
  return _attend(query, key, value)


def probabilities(
  query: Float[Array, "B M h d"],
  key: Float[Array, "B N h d"],
  logit_cap: float | None = None,
) -> Float[Array, "B h M N"]:
  """Return softmax(query key^T / sqrt(d)) in float32.

  With a cap c, each logit s becomes c tanh(s / c) (Gemma 2, arXiv:2408.00118,
  section 2).
  """
  query = query * query.shape[-1] ** -0.5
  logits = _product("bqhd,bkhd->bhqk", query, key, jnp.float32)
  if logit_cap is not None:
    logits = logit_cap * jnp.tanh(logits / logit_cap)
  return jax.nn.softmax(logits)


def _product(subscripts, x, y, dtype):
  """Return a product accumulated in float32, rounded to dtype."""
  if accelerator.platform() == "cpu":
    # On a CPU, XLA lacks some bfloat16 products with float32 accumulation.
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(subscripts, x, y).astype(dtype)
  return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)


@jax.custom_vjp
def _attend(query, key, value):
  return _forward(query, key, value)[0]


# Both passes divide the products by the softmax's sum, instead of the N^2
# probabilities. The exponentials E are the only array of shape [B, h, M, N] in
# memory. With E = exp(S - max S), Z = sum E and Y = E V / Z,
#
#   dV = E^T (dY / Z),  dS = E * ((dY / Z) V^T - sum_d(dY * Y) / Z).


def _forward(query, key, value):
  dtype, fill = value.dtype, _fill(query, key)
  query = query * query.shape[-1] ** -0.5
  query, key, value = (_heads_first(x, fill) for x in (query, key, value))
  scores = _product("bhqd,bhkd->bhqk", query, key, jnp.float32)
  if fill:
    real = jnp.arange(key.shape[2]) < key.shape[2] - fill
    scores = jnp.where(real, scores, -jnp.inf)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(dtype)
  if accelerator.platform() != "cpu":
    # Otherwise XLA stores the float32 scores for the backward pass.
    weights = jax.lax.optimization_barrier(weights)
  total = weights.astype(jnp.float32).sum(axis=-1, keepdims=True)
  # A sum over N tokens may overflow float16 before the division.
  wide = jnp.float32 if dtype == jnp.float16 else dtype
  y = _product("bhqk,bhkd->bhqd", weights, value, wide)
  y = (y / total).astype(dtype)
  return _tokens_first(y, fill), (query, key, value, weights, total, y)


def _backward(residuals, dy):
  query, key, value, weights, total, y = residuals
  dtype, fill = value.dtype, query.shape[2] - dy.shape[1]
  dy = _heads_first(dy, fill).astype(jnp.float32) / total
  shift = (dy * y).sum(axis=-1, keepdims=True)
  dy = dy.astype(dtype)
  dweights = _product("bhqd,bhkd->bhqk", dy, value, jnp.float32)
  dscores = (weights * (dweights - shift)).astype(dtype)
  dquery = _product("bhqk,bhkd->bhqd", dscores, key, dtype)
  dquery *= query.shape[-1] ** -0.5
  dkey = _product("bhqk,bhqd->bhkd", dscores, query, dtype)
  dvalue = _product("bhqk,bhqd->bhkd", weights, dy, dtype)
  return tuple(_tokens_first(x, fill) for x in (dquery, dkey, dvalue))


_attend.defvjp(_forward, _backward)


def _fill(query, key):
  """Return the number of padding tokens on a GPU: cuBLAS needs multiples of 8.

  Otherwise XLA pads each array of [N, N] in a separate kernel.
  """
  tokens = key.shape[1]
  is_one_of_many = query.shape[1] != tokens  # cuBLAS does not compute it.
  if accelerator.platform() == "cpu" or is_one_of_many:
    return 0
  return -tokens % 8


def _heads_first(x, fill):
  """Return x [B, N, h, d] as [B, h, N + fill, d]."""
  return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))


def _tokens_first(x, fill):
  """Return x [B, h, N + fill, d] as [B, N, h, d]."""
  return x[:, :, : x.shape[2] - fill].swapaxes(1, 2)
