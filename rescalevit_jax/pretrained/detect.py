"""Which model a set of weights belongs to, told by names and shapes."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from rescalevit_jax.models import base
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import variants
from rescalevit_jax.pretrained import npz

# Which keys a model has besides a plain one's, by what asks for them. Rescale's
# own residual has its parameter beside the norm's.
_RESIDUALS = {R.SLOT: name for name, R in residuals.RESIDUALS.items() if R.SLOT}
OPTIONS = {
  "residual": re.compile(rf".*/({'|'.join(_RESIDUALS)})_\d/scale"),
  "in_mlp": re.compile(rf".*/MlpBlock_3/{norms.IN_MLP}/.*"),
  "qk_norm": re.compile(r".*/(query|key)_norm/.*"),
  "sigma_reparam": re.compile(r".*/(gamma|singular_vector)"),
}


def option(key: str) -> str | None:
  """Returns which of `OPTIONS` a key belongs to; None if it is none's."""
  for name, pattern in OPTIONS.items():
    if pattern.fullmatch(key):
      return name
  return None


def settings(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Infers the arguments of `models.create` that change a block's arrays.

  GN's are LN's, so that it is not told from it, and no array shows c of the
  residual `rescalenet`.

  Args:
    arrays: by key, in the old numbering.
  """
  found = {option(key) for key in arrays}
  residual = "plain"
  for key in arrays:
    if match := OPTIONS["residual"].fullmatch(key):
      residual = _RESIDUALS[match[1]]
  return {
    "norm": norm(arrays),
    "residual": residual,
    "qk_norm": "qk_norm" in found,
    "sigma_reparam": "sigma_reparam" in found,
  }


def norm(arrays: Mapping[str, Any]) -> str:
  """Infers the norm from the keys; see `settings`."""
  plain = [key for key in arrays if option(key) is None]
  slots = {match[3] for match in map(npz.BLOCK.fullmatch, plain) if match}
  for name, Norm in norms.NORMS.items():
    if Norm.SLOT != base.Norm.SLOT and f"{Norm.SLOT}_0" in slots:
      return name
  if f"{base.Norm.SLOT}_0" not in slots:
    return "Identity"
  if any(key.endswith("/faded") for key in plain):
    return "Fade"
  if any(option(key) == "in_mlp" for key in arrays):
    return "BN2"
  return "BN" if any(key.startswith(npz.STATS) for key in plain) else "LN"


def other_model(
  path: str, file: Mapping[str, Any], model: Mapping[str, Any], details: str
) -> str | None:
  """Says that a file holds a model of other sizes.

  Args:
    path: of the file.
    file: its arrays (anything with a shape) by key, in the old numbering.
    model: the same of the model.
    details: what does not fit; said where no other model can be advised.

  Returns:
    A line for the user, or None if the sizes are the same.
  """
  theirs, ours = sizes(file), sizes(model)
  if all(None in (theirs[k], ours[k]) or theirs[k] == ours[k] for k in ours):
    return None
  name = _variant(theirs)
  return (
    f"{path} is a {name or 'ViT'} checkpoint ({_describe(theirs)}), the model"
    f" is {_variant(ours) or 'a ViT'} ({_describe(ours)}): "
    + (f"choose --config.model_name={name}" if name else details)
  )


def sizes(arrays: Mapping[str, Any]) -> dict[str, int | None]:
  """Infers a Variant's fields; None for what the arrays do not agree on.

  Args:
    arrays: anything with a shape, by key, in the old numbering.
  """

  def edge(pattern, rank, axis):
    found = {
      array.shape[axis]
      for key, array in arrays.items()
      if re.fullmatch(pattern, key) and len(array.shape) >= rank
    }
    return found.pop() if len(found) == 1 else None

  block = r"Transformer/encoderblock_\d+/"
  blocks = {int(b[2]) for b in map(npz.BLOCK.fullmatch, arrays) if b}
  whole = bool(blocks) and max(blocks) == len(blocks) - 1
  return {
    "patch_size": edge("embedding/kernel", 4, 0),
    "hidden_size": edge("cls|embedding/(kernel|bias)", 1, -1),
    "mlp_dim": edge(block + "MlpBlock_3/Dense_0/kernel", 2, 1),
    "num_heads": edge(
      block + "MultiHeadDotProductAttention_1/query/kernel", 3, 1
    ),
    "num_layers": len(blocks) if whole else None,
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
