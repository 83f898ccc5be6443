"""Norms that are linear in evaluation, put into the layers that follow them."""

from typing import Any

from flax import traverse_util
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax import identify
from rescalevit_jax.models import base
from rescalevit_jax.models import norms


def fold(params: Any, batch_stats: Any) -> tuple[Any, Any]:
  """Returns the weights of a model that computes the same without its norm.

  With y = factor * x + shift at a place, the next layer's y W + b is
  x (factor * W) + (shift W + b). Where x is taken about its mean over the
  channels, the columns of factor * W are instead, which comes to the same.
  Kernels of sigma_reparam become plain ones.

  Args:
    params: of a model whose norm is one of those that fold; not changed.
    batch_stats: of the same.

  Returns:
    Trees of a model with the norm Identity and the residual of before, float32.

  Raises:
    UserError: the norm cannot be folded.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  name = identify.norm(
    flat | traverse_util.flatten_dict({"batch_stats": batch_stats}, sep="/")
  )
  Norm = norms.NORMS[name]
  foldable = [
    name
    for name, other in norms.NORMS.items()
    if other.as_linear is not base.Norm.as_linear
  ]
  if name not in foldable:
    raise errors.UserError(
      f"{name} does not fold into the next layer; these do:"
      f" {', '.join(foldable)}"
    )
  # Leaves by path, so that those of a place can be taken out.
  flat = {k: np.asarray(x, np.float64) for k, x in flat.items()}
  stats = traverse_util.flatten_dict(batch_stats, sep="/")
  stats = {k: np.asarray(x) for k, x in stats.items()}
  for key in [key for key in flat if key.endswith("/gamma")]:
    layer = key.removesuffix("gamma")
    v = stats.pop(f"{layer}singular_vector").astype(np.float64)
    kernel = flat[f"{layer}kernel"]
    largest = np.linalg.norm(kernel.reshape(-1, v.size) @ v)
    flat[f"{layer}kernel"] = kernel * (flat.pop(key) / largest)
  for place, layers in _places(Norm, params).items():
    linear = Norm.as_linear(_take(flat, place), _take(stats, place))
    if linear is None:
      raise errors.UserError(
        f"{place}: {name} folds once it has faded, to a linear map and with one"
        " scale for class token and patches: take the latest checkpoint of a"
        " finished run with fade.alpha=0 and fade.apart=False"
      )
    factor, shift = linear
    for layer in layers:
      kernel = flat[f"{layer}/kernel"]
      flat[f"{layer}/bias"] += np.tensordot(shift, kernel, 1)
      factors = factor.reshape(-1, *[1] * (kernel.ndim - 1))
      kernel = factors * kernel
      if Norm.CENTERED:
        kernel = kernel - kernel.mean(axis=0)
      flat[f"{layer}/kernel"] = kernel
  flat = {k: np.asarray(x, np.float32) for k, x in flat.items()}
  return (
    traverse_util.unflatten_dict(flat, sep="/"),
    traverse_util.unflatten_dict(stats, sep="/"),
  )


def _places(Norm, params):
  """Returns the linear layers after each place, by path."""
  places = {}
  for name in params["Transformer"]:
    if name.startswith("encoderblock_"):
      block = f"Transformer/{name}"
      attention = f"{block}/MultiHeadDotProductAttention_1"
      places[f"{block}/{Norm.SLOT}_0"] = [
        f"{attention}/{layer}" for layer in ("query", "key", "value")
      ]
      places[f"{block}/{Norm.SLOT}_2"] = [f"{block}/MlpBlock_3/Dense_0"]
  if Norm.FINAL:
    last = "pre_logits" if "pre_logits" in params else "head"
    places["Transformer/encoder_norm"] = [last]
  return places


def _take(flat, place):
  """Takes a norm's arrays out, by name; the residual's stay."""
  keys = [
    key
    for key in flat
    if key.startswith(f"{place}/") and identify.option(key) is None
  ]
  return {key.rpartition("/")[2]: flat.pop(key) for key in keys}
