"""What a file's weights and a model's need not share: norm, options, head.

Keys are those of `pretrained.flatten`.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import npz

HEAD = ("head/kernel", "head/bias")
PRE_LOGITS = ("pre_logits/kernel", "pre_logits/bias")

_FINAL_NORM = "encoder_norm"
_AFFINE = {"scale", "bias"}


def same_places(
  file: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, str]:
  """Finds scale and bias of a norm that another one takes over.

  They are what norms have in common, and stand in one place by other names:
  `LayerNorm_0/scale` of a file is `Cal_0/scale` of a model.

  Returns:
    The model's keys by the file's. Empty, if the norms are of the same name, if
    one of them lacks scale or bias, or if the file has two for one place.
  """
  ours, theirs = _in_blocks(model), _in_blocks(file)
  both = (ours, theirs)
  if {slot for slot, _ in ours} & {slot for slot, _ in theirs}:
    return {}
  if not all({leaf for _, leaf in keys} >= _AFFINE for keys in both):
    return {}
  names = {_number(slot): slot for slot, _ in ours}
  found = {
    key: key.replace(f"/{slot}/", f"/{names[_number(slot)]}/")
    for (slot, leaf), keys in theirs.items()
    if leaf in _AFFINE and _number(slot) in names
    for key in keys
  }
  return found if len({*found.values()}) == len(found) else {}


def besides_affine(keys) -> set[str]:
  """Returns a norm's parameters that are neither its scale nor its bias."""
  return {key for key in keys if _norm_slot(key) and _leaf(key) not in _AFFINE}


def _in_blocks(keys) -> dict[tuple[str, str], list[str]]:
  """Returns the keys of the blocks' norms by slot and leaf."""
  found = {}
  for key in keys:
    slot = _norm_slot(key)
    if slot not in (None, _FINAL_NORM):
      found.setdefault((slot, _leaf(key)), []).append(key)
  return found


def _number(slot):
  return slot.rpartition("_")[2]


def _leaf(key):
  return key.rpartition("/")[2]


def _norm_slot(key: str) -> str | None:
  """Returns 'LayerNorm_0', 'encoder_norm', ...; None if key is no norm's."""
  if detect.option(key) is not None:
    return None
  if key.startswith(f"Transformer/{_FINAL_NORM}/"):
    return _FINAL_NORM
  block = npz.BLOCK.fullmatch(key)
  if not block or re.match("MultiHeadDotProductAttention|MlpBlock", block[3]):
    return None
  return block[3]


def norms(file, model) -> tuple[set[str], set[str], list[str]]:
  """Finds the norm's keys that are not translated between file and model.

  Parameters are not if the norms have other places, and statistics are not if
  they are of another kind or only one side has any. A part of them missing is
  no such case.

  Returns:
    The model's keys to leave initial, the file's keys to drop, and notes.
  """
  initial, dropped, notes = set(), set(), []
  ours, theirs = (
    {key: slot for key in keys if (slot := _norm_slot(key))}
    for keys in (model, file)
  )
  # The final norm's name is one for all: only the blocks' tell norms apart.
  slots, others = ({*s.values()} - {_FINAL_NORM} for s in (ours, theirs))
  if others and not others & slots:
    initial |= ours.keys()
    dropped |= theirs.keys()
    notes.append(
      f"the file's norm ({', '.join(sorted(others))}) is not the model's"
      f" ({', '.join(sorted(slots)) or 'none'})"
    )
  ours, theirs = (
    {key for key in keys if _is_statistic(key)} for keys in (model, file)
  )
  if not ours & theirs:
    initial |= ours
    dropped |= theirs
  return initial, dropped, notes


def _is_statistic(key: str) -> bool:
  return key.startswith(npz.STATS) and detect.option(key) is None


def options(file, model) -> tuple[set[str], set[str]]:
  """Finds the keys of options that only one side has, or each in its own way.

  Returns:
    The model's keys to leave initial, and the file's keys to drop.
  """
  initial, dropped = set(), set()
  for name in detect.OPTIONS:
    ours, theirs = (
      {key for key in keys if detect.option(key) == name}
      for keys in (model, file)
    )
    if not ours & theirs:
      initial |= ours
      dropped |= theirs
  return initial, dropped


def why_new_head(file, model, dropped, reinit_head) -> str | None:
  """Returns why the file's head is not taken; None if it must fit."""
  if not file.keys() & set(HEAD):
    return "the file has none"
  kernel, bias = (file.get(key, np.zeros(())) for key in HEAD)
  if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
    return None
  if dropped & set(PRE_LOGITS):
    return "the file's needs pre_logits, which the model does not have"
  inputs, classes = model["head/kernel"].shape
  if kernel.shape[0] != inputs:
    return None
  if reinit_head:
    return "as asked for"
  if kernel.shape[1] != classes:
    return f"the file's has {kernel.shape[1]} classes, the model's {classes}"
  return None
