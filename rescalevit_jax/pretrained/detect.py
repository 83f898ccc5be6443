"""Detect which model a set of weights belongs to, by names and shapes."""

from collections.abc import Mapping
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import vit_config
from rescalevit_jax.pretrained import param_keys

PERI = "Peri"  # The prefix of norms after a branch.

# Model options that add arrays to a plain block, with patterns of their keys.
# The parameter of a residual is a sibling of the norm's.
_RESIDUALS = {R.SLOT: name for name, R in residuals.RESIDUALS.items() if R.SLOT}
_IN_MLP = {N.IN_MLP for N in norms.NORMS.values() if N.IN_MLP}
OPTIONS = {
  "residual": re.compile(rf".*/({'|'.join(_RESIDUALS)})_\d/scale"),
  "norm_position": re.compile(rf".*/{PERI}\w+_\d/.*"),
  "embedding_norm": re.compile(r".*Transformer/embedding_norm/.*"),
  "in_mlp": re.compile(rf".*/MlpBlock_3/({'|'.join(_IN_MLP)})/.*"),
  "qk_norm": re.compile(r".*/(query|key)_norm/.*"),
  "sigma_reparam": re.compile(r".*/(gamma|singular_vector)"),
}
_POST = "Post"  # The prefix of norms after the addition.


def option(key: str) -> str | None:
  """Return the entry of `OPTIONS` that a key belongs to, or None."""
  for name, pattern in OPTIONS.items():
    if pattern.fullmatch(key):
      return name
  return None


def settings(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Infer the arguments of `models.create` that add or rename arrays.

  The constant c of the residual `rescalenet` cannot be inferred.
  """
  options = {option(key) for key in arrays}
  residual = "plain"
  for key in arrays:
    if match := OPTIONS["residual"].fullmatch(key):
      residual = _RESIDUALS[match[1]]
  flags = ("embedding_norm", "qk_norm", "sigma_reparam")
  pre_logits = arrays.get(param_keys.PRE_LOGITS[1])
  return {
    "norm": norm(arrays),
    "residual": residual,
    "norm_position": _position(arrays),
    **{name: name in options for name in flags},
    "representation_size": None if pre_logits is None else pre_logits.size,
  }


def _position(arrays):
  if any(OPTIONS["norm_position"].fullmatch(key) for key in arrays):
    return "peri"
  matches = filter(None, map(param_keys.BLOCK.fullmatch, arrays))
  return "post" if any(m[3].startswith(_POST) for m in matches) else "pre"


def norm(arrays: Mapping[str, Any]) -> str:
  """Infer the norm from the names of its arrays: the first `same_arrays`."""
  plain = [key for key in arrays if option(key) is None]
  blocks = filter(None, map(param_keys.BLOCK.fullmatch, plain))
  slots = {match[3].removeprefix(_POST) for match in blocks}
  stats = {
    key.rpartition("/")[2] for key in plain if key.startswith(param_keys.STATS)
  }
  in_mlp = any(option(key) == "in_mlp" for key in arrays)

  def matches(name):
    *_, own, name_in_mlp = _signature(name)
    return len(stats & own) + (bool(name_in_mlp) == in_mlp)

  found = [name for name, N in norms.NORMS.items() if f"{N.SLOT}_0" in slots]
  without = [name for name in norms.NORMS if not _signature(name)[1]]
  return max(found, key=matches) if found else without[0]


def same_arrays(name: str) -> list[str]:
  """Return the norms whose arrays have the same names as this norm's."""
  return [x for x in norms.NORMS if _signature(x) == _signature(name)]


@functools.cache
def _signature(name):
  """Return a norm's module name, parameters, statistics and norm in the MLP."""
  Norm = norms.NORMS[name]
  init = functools.partial(Norm(8).init, train=False)
  x = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
  variables = jax.eval_shape(init, jax.random.key(0), x)
  collections = (variables.get(k, {}) for k in ("params", "batch_stats"))
  return Norm.SLOT, *map(frozenset, collections), Norm.IN_MLP


def size_mismatch(
  path: str, file: Mapping[str, Any], model: Mapping[str, Any], details: str
) -> str | None:
  """Return a one-line error if a file's model has other sizes, else None.

  `details` are the mismatching arrays, for a file that is no named variant.
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


def position_mismatch(
  path: str, file: Mapping[str, Any], model: Mapping[str, Any]
) -> str | None:
  """Return an error if only the file or the model has norm_position=post."""
  theirs, ours = _position(file), _position(model)
  if "post" not in (theirs, ours) or theirs == ours:
    return None
  return (
    f"{path}: holds a model with norm_position={theirs}, the model has {ours};"
    f" set --config.model.norm_position={theirs}"
  )


def sizes(arrays: Mapping[str, Any]) -> dict[str, int | None]:
  """Infer the sizes of a `ViTConfig`; None where unknown or contradictory."""

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
  names = (k for k, v in vit_config.VARIANTS.items() if v == sizes)
  return next(names, None)


def _describe(sizes: Mapping[str, int | None]) -> str:
  patch, hidden, mlp, heads, layers = (s or "?" for s in sizes.values())
  return (
    f"patch {patch}, hidden {hidden}, MLP {mlp}, {heads} heads, {layers} layers"
  )
