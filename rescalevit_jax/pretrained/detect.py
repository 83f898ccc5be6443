"""Detect which model a set of weights belongs to, by names and shapes."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from rescalevit_jax.models import base
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import variants
from rescalevit_jax.pretrained import param_keys

# Model options that add arrays to a plain block, with patterns of their keys.
# The parameter of a residual is a sibling of the norm's.
_RESIDUALS = {R.SLOT: name for name, R in residuals.RESIDUALS.items() if R.SLOT}
OPTIONS = {
  "residual": re.compile(rf".*/({'|'.join(_RESIDUALS)})_\d/scale"),
  "in_mlp": re.compile(rf".*/MlpBlock_3/{norms.IN_MLP}/.*"),
  "qk_norm": re.compile(r".*/(query|key)_norm/.*"),
  "sigma_reparam": re.compile(r".*/(gamma|singular_vector)"),
}


def option(key: str) -> str | None:
  """Return the entry of `OPTIONS` that a key belongs to, or None."""
  for name, pattern in OPTIONS.items():
    if pattern.fullmatch(key):
      return name
  return None


def settings(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Infer the arguments of `models.create` that add or rename arrays.

  GN has the same arrays as LN and is reported as LN. The constant c of the
  residual `rescalenet` cannot be inferred.

  Args:
    arrays: arrays by key.
  """
  options = {option(key) for key in arrays}
  residual = "plain"
  for key in arrays:
    if match := OPTIONS["residual"].fullmatch(key):
      residual = _RESIDUALS[match[1]]
  return {
    "norm": norm(arrays),
    "residual": residual,
    "qk_norm": "qk_norm" in options,
    "sigma_reparam": "sigma_reparam" in options,
  }


def norm(arrays: Mapping[str, Any]) -> str:
  """Infer the name of the norm; see `settings`."""
  plain = [key for key in arrays if option(key) is None]
  matches = map(param_keys.BLOCK.fullmatch, plain)
  slots = {match[3] for match in matches if match}
  for name, Norm in norms.NORMS.items():
    if Norm.SLOT != base.Norm.SLOT and f"{Norm.SLOT}_0" in slots:
      return name
  if f"{base.Norm.SLOT}_0" not in slots:
    return "Identity"
  if any(key.endswith("/faded") for key in plain):
    return "Fade"
  if any(option(key) == "in_mlp" for key in arrays):
    return "BN2"
  return (
    "BN" if any(key.startswith(param_keys.STATS) for key in plain) else "LN"
  )


def size_mismatch(
  path: str, file: Mapping[str, Any], model: Mapping[str, Any], details: str
) -> str | None:
  """Return an error message if a file's model has other sizes.

  Args:
    path: the file's path.
    file: arrays of the file, or anything with a shape, by key.
    model: the same for the model.
    details: the mismatching arrays; used if no named variant has these sizes.

  Returns:
    One line, or None if the sizes agree.
  """
  theirs, ours = sizes(file), sizes(model)
  if all(None in (theirs[k], ours[k]) or theirs[k] == ours[k] for k in ours):
    return None
  name = _variant(theirs)
  return (
    f"{path}: this is a {name or 'ViT'} checkpoint ({_describe(theirs)}), the"
    f" model is {_variant(ours) or 'a ViT'} ({_describe(ours)}); "
    + (f"choose --config.model_name={name}" if name else details)
  )


def sizes(arrays: Mapping[str, Any]) -> dict[str, int | None]:
  """Infer the sizes of a model, by the fields of `variants.Variant`.

  Args:
    arrays: arrays, or anything with a shape, by key.

  Returns:
    The sizes. None where arrays are missing or disagree.
  """

  def common_size(pattern, rank, axis):
    found = {
      array.shape[axis]
      for key, array in arrays.items()
      if re.fullmatch(pattern, key) and len(array.shape) >= rank
    }
    return found.pop() if len(found) == 1 else None

  block = r"Transformer/encoderblock_\d+/"
  matches = map(param_keys.BLOCK.fullmatch, arrays)
  blocks = {int(match[2]) for match in matches if match}
  complete = bool(blocks) and max(blocks) == len(blocks) - 1
  return {
    "patch_size": common_size("embedding/kernel", 4, 0),
    "hidden_size": common_size("cls|embedding/(kernel|bias)", 1, -1),
    "mlp_dim": common_size(block + "MlpBlock_3/Dense_0/kernel", 2, 1),
    "num_heads": common_size(
      block + "MultiHeadDotProductAttention_1/query/kernel", 3, 1
    ),
    "num_layers": len(blocks) if complete else None,
  }


def _variant(sizes: Mapping[str, int | None]) -> str | None:
  for name, variant in variants.VARIANTS.items():
    if dataclasses.asdict(variant) == sizes:
      return name
  return None


def _describe(sizes: Mapping[str, int | None]) -> str:
  patch, hidden, mlp, heads, layers = (s or "?" for s in sizes.values())
  return (
    f"patch {patch}, hidden {hidden}, MLP {mlp}, {heads} heads, {layers} layers"
  )
