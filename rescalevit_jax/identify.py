"""Which model a set of weights belongs to, told by the shapes."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from rescalevit_jax import npz
from rescalevit_jax.models import variants


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
