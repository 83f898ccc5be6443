"""cuDNN's fused attention, by XLA's custom calls.

`jax.nn.dot_product_attention` makes the same calls, but rejects odd numbers of
tokens in training: it applies a rule for biases, an even size, to an empty
bias. A ViT with a class token usually has an odd number.

Axes: B images, N tokens, h heads of d channels.
"""

import functools
import json

import jax
from jax.experimental.custom_partitioning import custom_partitioning
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

_FORWARD = "__cudnn$fmhaSoftmax"
_BACKWARD = "__cudnn$fmhaSoftmaxBackward"

# Axes of each product in XLA's config: the contracted axis of both operands,
# then their batch axes. P are the probabilities [B, h, N, N], and the others
# are [B, N, h, d].
_QKV, _P = (0, 2), (0, 1)  # Image and head.
_FORWARD_PRODUCTS = {
  "bmm1": (3, 3, _QKV, _QKV),  # Q K^T
  "bmm2": (3, 1, _P, _QKV),  # P V
}
_BACKWARD_PRODUCTS = {
  "bmm1_grad_gemm1": (2, 1, _P, _QKV),  # dS^T Q
  "bmm1_grad_gemm2": (3, 1, _P, _QKV),  # dS K
  "bmm2_grad_gemm1": (2, 1, _P, _QKV),  # P^T dY
  "bmm2_grad_gemm2": (3, 3, _QKV, _QKV),  # dY V^T
}


@jax.custom_vjp
def attend(
  query: Float[Array, "B N h d"],
  key: Float[Array, "B N h d"],
  value: Float[Array, "B N h d"],
) -> Float[Array, "B N h d"]:
  """Return softmax(query key^T / sqrt(d)) value, in bfloat16 or float16."""
  return _infer(query, key, value)


def _attend_forward(query, key, value):
  y, log_sums = _forward(query, key, value)
  return y, (query, key, value, log_sums, y)


def _attend_backward(residuals, dy):
  query, key, value, log_sums, y = residuals
  return _backward(query, key, value, log_sums, dy.astype(y.dtype), y)


attend.defvjp(_attend_forward, _attend_backward)


def _per_device(rule):
  """Return a decorator that runs a function on each device's own images.

  The rule names the axes of arguments and results; b is sharded.
  """

  def partition(function, mesh, arguments, results):
    batch = arguments[0].sharding.spec[:1]
    by_image = NamedSharding(mesh, PartitionSpec(*batch))
    shardings = jax.tree.map(lambda _: by_image, (results, arguments))
    return mesh, function, *shardings

  def decorate(function):
    partitioned = custom_partitioning(function)
    partitioned.def_partition(
      functools.partial(partition, function), sharding_rule=rule
    )
    return partitioned

  return decorate


@_per_device("b n h d, b m h d, b m h d -> b n h d")
def _infer(query, key, value):
  return _call(_FORWARD, query, (query, key, value), 1)[0]


@_per_device("b n h d, b m h d, b m h d -> b n h d, b h n")
def _forward(query, key, value):
  return _call(_FORWARD, query, (query, key, value), 1, with_log_sums=True)


@_per_device(
  "b n h d, b m h d, b m h d, b h n, b n h d, b n h d"
  " -> b n h d, b m h d, b m h d"
)
def _backward(query, key, value, log_sums, dy, y):
  return _call(_BACKWARD, query, (query, key, value, log_sums, dy, y), 3)


def _call(target, query, operands, outputs, with_log_sums=False):
  """Call cuDNN on the images of one device; its last result is a workspace."""
  batch, tokens, heads, channels = query.shape
  # The memory layout is the linear layers', [B, N, h, d].
  like_query = jax.ShapeDtypeStruct(
    (batch, heads, tokens, channels), query.dtype
  )
  results, layouts = [like_query] * outputs, [(0, 2, 1, 3)] * outputs
  if with_log_sums:
    results.append(jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32))
    layouts.append((0, 1, 2))
  found = jax.ffi.ffi_call(
    target,
    [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],
    output_layouts=[*layouts, (0,)],
    custom_call_api_version=2,
    legacy_backend_config=_config(target, query.shape, query.dtype),
  )(*operands)
  swapped = [x.swapaxes(1, 2) for x in found[:outputs]]
  return tuple(swapped + found[outputs:-1])


@functools.cache
def _config(target, shape, dtype):
  """Return XLA's description of the attention, as JSON."""
  batch, tokens, heads, channels = shape
  products = _FORWARD_PRODUCTS if target == _FORWARD else _BACKWARD_PRODUCTS
  config = {
    "is_flash_attention": True,
    "fmha_scale": channels**-0.5,
    "mask_type": "NO_MASK",
    "dropout_rate": 0.0,
    "sliding_window_length": 0,
    "max_seg_per_batch": 1,
    "is_paged_attention": False,
    "algorithm": {
      "algo_id": "0",
      "math_type": "TENSOR_OP_MATH",
      "tuning_knobs": {"17": "1", "24": "0"},
      "is_cudnn_frontend": True,
      "workspace_size": "0",
    },
    "intermediate_tensor_shape": {
      "element_type": {"bfloat16": "BF16", "float16": "F16"}[dtype.name],
      "dimensions": [str(n) for n in (batch, heads, tokens, tokens)],
      "is_dynamic_dimension": [False] * 4,
      "layout": {"minor_to_major": ["3", "2", "1", "0"]},
    },
  }
  for name, (left, right, left_batch, right_batch) in products.items():
    config[f"{name}_dot_dimension_numbers"] = {
      "lhs_contracting_dimensions": [str(left)],
      "rhs_contracting_dimensions": [str(right)],
      "lhs_batch_dimensions": [str(axis) for axis in left_batch],
      "rhs_batch_dimensions": [str(axis) for axis in right_batch],
    }
  return json.dumps(
    {"operation_queue_id": "0", "cudnn_fmha_backend_config": config}
  )
