"""Rules for loading weights into a model with another norm, option or head.

Each rule compares the keys of a file with those of the model, see `param_keys`.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import re
from typing import Any

import numpy as np

from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import param_keys

# Norms outside the blocks, whose names do not show the kind of norm.
_OUTSIDE = ("embedding_norm", "encoder_norm")
_AFFINE = {"scale", "bias"}


def renamed_affine(
  file: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, str]:
  """Map the file's keys of scale and bias to the model's, if names differ.

  Both norms have them at the same sites under different names, such as
  `LayerNorm_0/scale` in the file and `Cal_0/scale` in the model. The result is
  empty if the norms have the same name, if only one of them has a scale or a
  bias, or if the file has two norms at a site.
  """
  ours, theirs = _in_blocks(model), _in_blocks(file)
  both = (ours, theirs)
  if {slot for slot, _ in ours} & {slot for slot, _ in theirs}:
    return {}
  affine, others = ({leaf for _, leaf in keys} & _AFFINE for keys in both)
  if affine != others:
    return {}
  our_slots = {_site(slot): slot for slot, _ in ours}
  names = {
    key: key.replace(f"/{slot}/", f"/{our_slots[_site(slot)]}/")
    for (slot, leaf), keys in theirs.items()
    if leaf in _AFFINE and _site(slot) in our_slots
    for key in keys
  }
  return names if len({*names.values()}) == len(names) else {}


def differences(
  file: Mapping[str, Any], model: Mapping[str, Any], affine_only: bool
) -> Iterator[tuple[set[str], set[str], str]]:
  """Yield (model keys, file keys, note) of each difference.

  The model's keys stay at their initial values, the file's are ignored. The
  note is empty if the difference is harmless. The file's norms already have the
  model's names; if `affine_only`, only their scale and bias are used.
  """
  ours, theirs = _select(_norm_slot, model, file)
  our_slots, their_slots = (
    {slot for slot, _ in _in_blocks(keys)} for keys in (ours, theirs)
  )
  if their_slots and not their_slots & our_slots:
    note = (
      f"the file's norm ({', '.join(sorted(their_slots))}) is not the model's"
      f" ({', '.join(sorted(our_slots)) or 'none'})"
    )
    yield ours, theirs, note
  # Statistics are copied if file and model share one in a block. In that case,
  # each missing statistic is an error.
  ours, theirs = _select(_is_statistic, model, file)
  if all(map(_is_outside, ours & theirs)):
    yield ours, theirs, ""
  if affine_only:
    note = (
      "only scale and bias of the file's norm are used, as the model's norm is"
      " a different one"
    )
    yield *_select(_is_besides_affine, model, file), note
  for option in sorted({*filter(None, map(_option, [*model, *file]))}):
    ours, theirs = (
      {key for key in keys if _option(key) == option} for keys in (model, file)
    )
    if not ours & theirs:
      note = f"the file's arrays of {option} are dropped, so the outputs differ"
      exact = not theirs or option == "sigma_reparam"  # Loading removes it.
      yield ours, theirs, "" if exact else note
  if not model.keys() & set(param_keys.PRE_LOGITS):
    yield set(), file.keys() & set(param_keys.PRE_LOGITS), ""


def why_new_head(
  file: Mapping[str, Any], model: Mapping[str, Any], reinit_head: bool
) -> str | None:
  """Return why the head starts at zeros; None if the file's head must fit."""
  if not file.keys() & set(param_keys.HEAD):
    return "the file has none"
  kernel, bias = (file.get(key, np.zeros(())) for key in param_keys.HEAD)
  if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
    return None
  pre_logits = set(param_keys.PRE_LOGITS)
  if file.keys() & pre_logits and not model.keys() & pre_logits:
    return "the file's head needs pre_logits, which the model does not have"
  inputs, classes = model["head/kernel"].shape
  if kernel.shape[0] != inputs:
    return None
  if reinit_head:
    return "config.reinit_head is set"
  if kernel.shape[1] != classes:
    return f"the file has {kernel.shape[1]} classes, the model has {classes}"
  return None


def _select(wanted, model, file):
  """Return the wanted keys of the model and of the file."""
  return {*filter(wanted, model)}, {*filter(wanted, file)}


def _is_besides_affine(key):
  return _norm_slot(key) and _leaf(key) not in _AFFINE


def _in_blocks(keys: Iterable[str]) -> dict[tuple[str, str], list[str]]:
  """Return the keys of the blocks' norms by slot and leaf."""
  found = collections.defaultdict(list)
  for key in keys:
    slot = _norm_slot(key)
    if slot and slot not in _OUTSIDE:
      found[slot, _leaf(key)].append(key)
  return found


def _site(slot):
  return slot.startswith(detect.PERI), slot.rpartition("_")[2]


def _leaf(key):
  return key.rpartition("/")[2]


def _norm_slot(key: str) -> str | None:
  """Return 'LayerNorm_0', 'encoder_norm', ...; None if key is no norm's."""
  for name in _OUTSIDE:
    if key.startswith(f"Transformer/{name}/"):
      return name
  if detect.option(key) not in (None, "norm_position"):
    return None
  block = param_keys.BLOCK.fullmatch(key)
  if not block or re.match("MultiHeadDotProductAttention|MlpBlock", block[3]):
    return None
  return block[3]


def _option(key: str) -> str | None:
  """Return `detect.option`, with the statistics of norm_position apart."""
  name = detect.option(key)
  separate = name == "norm_position" and key.startswith(param_keys.STATS)
  return f"{name} statistics" if separate else name


def _is_outside(key: str) -> bool:
  return f"/{key}".split("/")[-2] in _OUTSIDE


def _is_statistic(key: str) -> bool:
  """Return whether a key is a running statistic, but not of an option."""
  return key.startswith(param_keys.STATS) and (
    _is_outside(key) or detect.option(key) is None
  )
