"""Fold linear operations of a model into adjacent linear layers."""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import traits
from rescalevit_jax.models.ops import normalization
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import sigma_kernels


def fold(
  name: str,
  params: Any,
  batch_stats: Any,
  *,
  depth_scaling: bool = False,
  epsilon: float = normalization.EPSILON,
) -> tuple[Any, Any]:
  """Return the weights of an equivalent model without norms, in float32.

  If a site computes y = factor * x + shift, the next layer's y W + b equals
  x (factor * W) + (shift W + b). If the norm subtracts the mean of x over the
  channels, the columns of factor * W are centered instead, with equal results.
  A norm after a layer, inside the MLP, scales the layer's columns and bias.
  Kernels with sigma_reparam become plain ones.

  The result belongs to a model with the norm Identity and the same residual.
  `depth_scaling` and `epsilon` are the model's `norm_depth_scaling` and
  `norm_epsilon`.

  Raises:
    UserError: the norm, or its position, does not fold.
  """
  Norm = norms.NORMS[name]
  if not issubclass(Norm, traits.Foldable):
    foldable = [
      x for x, N in norms.NORMS.items() if issubclass(N, traits.Foldable)
    ]
    raise errors.UserError(
      f"{name} does not fold into the next layer; choose one of"
      f" {', '.join(foldable)}"
    )
  arrays = param_keys.flatten(params, batch_stats)
  found = detect.settings(arrays)
  if found["norm_position"] != "pre" or found["embedding_norm"]:
    raise errors.UserError(
      "--fold: only norms before linear layers fold, so norm_position=post or"
      " peri and embedding_norm do not; export without --fold"
    )
  arrays = sigma_kernels.to_plain(
    {key: _astype(x, np.float64) for key, x in arrays.items()}
  )

  def pop_linear(site):
    own = _pop(arrays, site), _pop(arrays, f"{param_keys.STATS}{site}")
    try:
      return Norm.as_linear(*own, epsilon)
    except ValueError as e:
      raise errors.UserError(f"{site}: {e}") from e

  for site, layers in _layers_after_sites(Norm, params).items():
    factor, shift = pop_linear(site)
    block = re.search(r"encoderblock_(\d+)", site)
    if depth_scaling and block:
      scale = (int(block[1]) + 1) ** -0.5
      factor, shift = scale * factor, scale * shift
    for layer in layers:
      kernel = arrays[f"{layer}/kernel"]
      arrays[f"{layer}/bias"] += np.tensordot(shift, kernel, 1)
      factors = factor.reshape(-1, *[1] * (kernel.ndim - 1))
      kernel = factors * kernel
      if Norm.CENTERED:
        kernel = kernel - kernel.mean(axis=0)
      arrays[f"{layer}/kernel"] = kernel
  for block in _blocks(params) if Norm.IN_MLP else ():
    factor, shift = pop_linear(f"{block}/MlpBlock_3/{Norm.IN_MLP}")
    layer = f"{block}/MlpBlock_3/Dense_0"
    arrays[f"{layer}/kernel"] *= factor
    arrays[f"{layer}/bias"] = factor * arrays[f"{layer}/bias"] + shift
  return param_keys.unflatten(
    {key: _astype(x, np.float32) for key, x in arrays.items()}
  )


def _astype(x, dtype):
  """Return a copy in a floating type; integers stay as they are."""
  x = np.asarray(x)
  return x if np.issubdtype(x.dtype, np.integer) else x.astype(dtype)


def _blocks(params):
  """Return the paths of the encoder blocks."""
  return [
    f"Transformer/{name}"
    for name in params["Transformer"]
    if name.startswith("encoderblock_")
  ]


def _layers_after_sites(Norm, params):
  """Return the paths of the linear layers that follow each norm, by site."""
  layers = {}
  for block in _blocks(params):
    attention = f"{block}/MultiHeadDotProductAttention_1"
    layers[f"{block}/{Norm.SLOT}_0"] = [
      f"{attention}/{layer}" for layer in ("query", "key", "value")
    ]
    layers[f"{block}/{Norm.SLOT}_2"] = [f"{block}/MlpBlock_3/Dense_0"]
  if Norm.FINAL:
    last = "pre_logits" if "pre_logits" in params else "head"
    layers["Transformer/encoder_norm"] = [last]
  return layers


def _pop(arrays, site):
  """Remove and return a norm's arrays, by name; keep the residual's."""
  keys = [
    key
    for key in arrays
    if key.startswith(f"{site}/") and detect.option(key) != "residual"
  ]
  return {key.rpartition("/")[2]: arrays.pop(key) for key in keys}


def layer_scale(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Multiply the output layers of the branches by their LayerScale.

  Raises:
    ValueError: their widths differ.
  """
  folded = dict(arrays)
  for key in arrays:
    if not (match := re.fullmatch(r"(.*/)LayerScale_([02])/scale", key)):
      continue
    block, slot = match.groups()
    gamma = folded.pop(key)
    layer = (
      "MultiHeadDotProductAttention_1/out"
      if slot == "0"
      else "MlpBlock_3/Dense_1"
    )
    for leaf in ("kernel", "bias"):
      name = f"{block}{layer}/{leaf}"
      if gamma.shape != arrays[name].shape[-1:]:
        raise ValueError(
          f"{key} has the shape {list(gamma.shape)}, but {name} has"
          f" {list(arrays[name].shape)}"
        )
      folded[name] = arrays[name] * gamma
  return folded


def input_normalization(
  arrays: Mapping[str, np.ndarray], mean: np.ndarray, std: np.ndarray
) -> dict[str, np.ndarray]:
  """Change a model's inputs from (x - mean) / std, x in [0, 1], to [-1, 1].

  With y in [-1, 1], x = (y + 1) / 2, so its input is y / (2 std) + (1/2 - mean)
  / std, channel by channel; the patch embedding is linear in it.
  """
  kernel = arrays["embedding/kernel"].astype(np.float64)
  shift = ((0.5 - mean) / std) @ kernel.sum((0, 1))
  scaled = kernel * (0.5 / std)[:, None]
  bias = arrays["embedding/bias"].astype(np.float64) + shift
  return {
    **arrays,
    "embedding/kernel": scaled.astype(np.float32),
    "embedding/bias": bias.astype(np.float32),
  }
