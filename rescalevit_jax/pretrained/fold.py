"""Norms that are linear in evaluation, put into the layers that follow them."""

from typing import Any

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.models import base
from rescalevit_jax.models import norms
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import sigma_arrays


def fold(name: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
  """Returns the weights of a model that computes the same without its norm.

  With y = factor * x + shift at a place, the next layer's y W + b is
  x (factor * W) + (shift W + b). Where x is taken about its mean over the
  channels, the columns of factor * W are instead, which comes to the same.
  Kernels of sigma_reparam become plain ones.

  Args:
    name: the norm's; those that fold have `as_linear`.
    params: of the model; not changed.
    batch_stats: of the same.

  Returns:
    Trees of a model with the norm Identity and the residual of before, float32.

  Raises:
    UserError: the norm cannot be folded.
  """
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
  # By key, so that those of a place can be taken out.
  flat = load.flatten(params, batch_stats)
  flat = sigma_arrays.plain(
    {k: _as_type(x, np.float64) for k, x in flat.items()}
  )
  for place, layers in _places(Norm, params).items():
    linear = Norm.as_linear(
      _take(flat, place), _take(flat, f"{npz.STATS}{place}")
    )
    if linear is None:
      raise errors.UserError(
        f"{place}: {name} folds once it has faded, to a linear map and with one"
        " scale for class token and patches: take the latest checkpoint of a"
        " finished run with fade.alpha=0 and fade.separate_cls=False"
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
  return load.unflatten({k: _as_type(x, np.float32) for k, x in flat.items()})


def _as_type(x, dtype):
  """Returns an array, of a type of its own if its numbers are no integers."""
  x = np.asarray(x)
  return x if np.issubdtype(x.dtype, np.integer) else x.astype(dtype)


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
    if key.startswith(f"{place}/") and detect.option(key) is None
  ]
  return {key.rpartition("/")[2]: flat.pop(key) for key in keys}
