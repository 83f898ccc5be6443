"""Keys of a model's arrays: Google's parameter names, joined with '/'.

A tree and an `.npz` file are compared key by key. Blocks are in the numbering
of the published checkpoints. Keys of `batch_stats` have that prefix.
"""

from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util

STATS = "batch_stats/"
BLOCK = re.compile(r"(Transformer/encoderblock_(\d+)/)([^/]+)(/.*)")
HEAD = ("head/kernel", "head/bias")
PRE_LOGITS = ("pre_logits/kernel", "pre_logits/bias")
POSITION_EMBEDDING = "Transformer/posembed_input/pos_embedding"

# Newer checkpoints number the modules of a block class by class.
_OLD_NUMBERING = {
  "LayerNorm_1": "LayerNorm_2",
  "MlpBlock_0": "MlpBlock_3",
  "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
}


def flatten(
  params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the leaves of a model's trees by key."""
  tree = {**params, "batch_stats": batch_stats}
  return traverse_util.flatten_dict(tree, sep="/")


def unflatten(arrays: Mapping[str, Any]) -> tuple[dict, dict]:
  """Return the trees of parameters and statistics; the inverse of `flatten`."""
  params = traverse_util.unflatten_dict(arrays, sep="/")
  stats = params.pop("batch_stats", {})
  return params, stats


def old_numbering(key: str) -> str:
  """Return a key in the numbering of the published checkpoints."""
  match = BLOCK.fullmatch(key)
  if not match:
    return key
  block, _, slot, rest = match.groups()
  return block + _OLD_NUMBERING.get(slot, slot) + rest
