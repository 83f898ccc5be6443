"""Pretrained weights into a model's parameter tree, and out of it.

The tree, flattened with '/', has the keys of Google's published `.npz` files,
so a file and a tree are compared key by key. Loading is strict: what may differ
(the head, `pre_logits`, the grid of the position embedding, the norm, and what
`identify.OPTIONS` lists) is reported, anything else is an error.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import math
import os
import re
from typing import Any

from flax import traverse_util
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import positions
from rescalevit_jax.pretrained import sigma_arrays
from rescalevit_jax.pretrained import transfer

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_SIGMA = "sigma_reparam"


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of each key. Statistics have the prefix `batch_stats/`.

  Attributes:
    loaded: the model's keys that hold the file's values unchanged.
    resized: the model's keys that hold the file's values, interpolated.
    carried: the model's keys that hold scale or bias of another norm.
    reinitialized: the model's keys that were set to zeros.
    derived: the model's keys that follow from the file's values.
    initial: the model's keys that stay at their initial value.
    dropped: the file's keys, by their names there, that went unused.
    lost: those of them without which the model computes something else.
    notes: the reasons, a sentence each.
  """

  loaded: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()
  carried: tuple[str, ...] = ()
  reinitialized: tuple[str, ...] = ()
  derived: tuple[str, ...] = ()
  initial: tuple[str, ...] = ()
  dropped: tuple[str, ...] = ()
  lost: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def summary(self) -> str:
    """Returns a few lines for the log, all encoder blocks put together."""
    lines = []
    for title, keys in (
      ("loaded", self.loaded),
      ("resized", self.resized),
      ("carried over from another norm", self.carried),
      ("set to zeros", self.reinitialized),
      ("derived from the file", self.derived),
      ("left at initial values", self.initial),
      ("dropped from the file", self.dropped),
    ):
      if keys:
        lines.append(f"{title}: {len(keys)} array{'s' * (len(keys) > 1)}")
        lines += [f"  {line}" for line in _grouped(keys)]
    return "\n".join(lines + [f"note: {note}" for note in self.notes])


def load(
  path: str | os.PathLike[str],
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
  *,
  reinit_head: bool = False,
  allow_nonfinite: bool = False,
) -> tuple[dict[str, Any], dict[str, Any], Report]:
  """Puts a checkpoint's weights into a freshly initialized model's trees.

  Args:
    path: an `.npz` in Google's naming, old or new numbering, all keys possibly
      behind a prefix such as `params/`; or a file that `save` wrote. Its arrays
      may take four times the model's bytes and `npz.SLACK`.
    params: nested dict; of its leaves only `shape` and `dtype` are used.
    batch_stats: the same for the statistics; may be empty.
    reinit_head: sets the head to zeros even if the file's would fit.
    allow_nonfinite: takes weights that are NaN or infinite.

  Returns:
    New trees of the same structure and shapes, and the report. Loaded leaves
    are numpy arrays, float32 (or the model's integer type); others are those
    given.

  Raises:
    UserError: the file cannot be read or is not this model's.
  """
  path = os.fspath(path)
  model = flatten(params, batch_stats)
  checkpoint = npz.read(path, max_bytes=4 * _bytes(model) + npz.SLACK)
  renamed = transfer.same_places(checkpoint.arrays, model)
  file, names = (
    {renamed.get(key, key): value for key, value in found.items()}
    for found in (checkpoint.arrays, checkpoint.names)
  )

  initial, dropped, notes = transfer.norms(file, model)
  if renamed:
    initial |= transfer.besides_affine(model)
    dropped |= transfer.besides_affine(file)
    notes.append(
      "of the file's norm, which is not the model's, scale and bias are taken"
    )
  more_initial, more_dropped = transfer.options(file, model)
  initial |= more_initial
  dropped |= more_dropped
  if not model.keys() & set(transfer.PRE_LOGITS):
    dropped |= file.keys() & set(transfer.PRE_LOGITS)
  zeros = set()
  if reason := transfer.why_new_head(file, model, dropped, reinit_head):
    zeros.update(transfer.HEAD)
    notes.append(f"the head starts at zeros: {reason}")

  values, problems = {}, []
  derived = {key for key in initial if detect.option(key) == _SIGMA}
  if any(detect.option(key) == _SIGMA for key in dropped):
    try:
      file = sigma_arrays.plain(file)
    except (KeyError, ValueError) as e:
      raise errors.UserError(f"{path}: sigma_reparam's arrays: {e}") from e
    notes.append("the file's layers with sigma_reparam become plain ones")
  for key, leaf in model.items():
    if key in initial:
      values[key] = leaf
    elif key in zeros:
      values[key] = np.zeros(leaf.shape, np.float32)
    elif key not in file:
      problems.append(f"{key} is missing, the model's shape is {leaf.shape}")
    else:
      try:
        values[key] = _fit(key, file[key], leaf, allow_nonfinite)
      except ValueError as e:
        problems.append(f"{key} {e}")
  problems += [
    f"{names[key]}, shape {file[key].shape}, is not in the model"
    for key in file
    if key not in model and key not in dropped
  ]
  if problems:
    details = "; ".join(problems[:3])
    if len(problems) > 3:
      details += f"; and {len(problems) - 3} more"
    raise errors.UserError(
      detect.other_model(path, file, model, details)
      or f"{path}: does not fit the model: {details}"
    )

  if derived:
    try:
      values |= sigma_arrays.start(values)
    except ValueError as e:
      raise errors.UserError(f"{path}: not for sigma_reparam: {e}") from e
  initial -= derived
  taken = model.keys() - initial - derived - zeros
  carried = set(renamed.values())
  resized = {key for key in taken if file[key].shape != model[key].shape}
  if resized:
    notes.append(
      f"the position embedding went from {file[_POSITIONS].shape[1]} to"
      f" {model[_POSITIONS].shape[1]} tokens"
    )
  report = Report(
    loaded=tuple(sorted(taken - resized - carried)),
    resized=tuple(sorted(resized)),
    carried=tuple(sorted(carried)),
    reinitialized=tuple(sorted(zeros)),
    derived=tuple(sorted(derived)),
    initial=tuple(sorted(initial)),
    dropped=(
      *sorted(names[key] for key in dropped),
      *sorted(checkpoint.outside),
    ),
    lost=tuple(
      sorted(names[key] for key in dropped if detect.option(key) != _SIGMA)
    ),
    notes=tuple(notes),
  )
  return *unflatten(values), report


def save(
  path: str | os.PathLike[str],
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
) -> None:
  """Writes an `.npz` in Google's old numbering; `load` reads it back exactly.

  Args:
    path: written as it is; an existing file is replaced once the new one is
      complete.
    params: nested dict of arrays.
    batch_stats: nested dict of arrays, stored under `batch_stats/`.

  Raises:
    UserError: the file cannot be written.
  """
  npz.write(os.fspath(path), flatten(params, batch_stats))


def flatten(
  params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a model's leaves by their keys in a file."""
  flat = traverse_util.flatten_dict(params, sep="/")
  stats = traverse_util.flatten_dict(batch_stats, sep="/")
  return flat | {npz.STATS + key: value for key, value in stats.items()}


def unflatten(values: Mapping[str, Any]) -> tuple[dict, dict]:
  """Returns the trees of parameters and statistics; see `flatten`."""
  params, stats = {}, {}
  for key, value in values.items():
    tree = stats if key.startswith(npz.STATS) else params
    tree[key.removeprefix(npz.STATS)] = value
  return (
    traverse_util.unflatten_dict(params, sep="/"),
    traverse_util.unflatten_dict(stats, sep="/"),
  )


def _bytes(model: Mapping[str, Any]) -> int:
  return sum(
    math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for leaf in model.values()
  )


def _fit(
  key: str, value: np.ndarray, leaf: Any, allow_nonfinite: bool
) -> np.ndarray:
  """Returns value in leaf's shape and type; ValueError if it does not fit."""
  integer = np.issubdtype(leaf.dtype, np.integer)
  dtype = np.dtype(leaf.dtype if integer else np.float32)
  if integer == (value.dtype.kind == "f"):
    raise ValueError(f"has dtype {value.dtype}, the model's is {dtype}")
  if not (allow_nonfinite or np.isfinite(value).all()):
    raise ValueError(
      "holds NaN or infinite values, which"
      " --config.pretrained_allow_nonfinite=True would take"
    )
  if value.shape != leaf.shape:
    mismatch = f"has shape {value.shape}, the model's is {leaf.shape}"
    grid_only = value.ndim == 3 and value.shape[::2] == leaf.shape[::2]
    if key != _POSITIONS or not grid_only:
      raise ValueError(mismatch)
    try:
      value = positions.resize(value, leaf.shape[1])
    except ValueError as e:
      raise ValueError(f"{mismatch}, and {e}") from e
  return value.astype(dtype, copy=False)


def _grouped(keys: Iterable[str], limit: int = 20) -> list[str]:
  """Returns lines such as 'encoderblock_*/norm/{bias,scale}'."""
  leaves = collections.defaultdict(set)
  for key in keys:
    parent, slash, leaf = key.rpartition("/")
    parent = re.sub(r"encoderblock_\d+", "encoderblock_*", parent)
    leaves[parent + slash].add(leaf)
  lines = []
  for parent, found in leaves.items():
    names = ",".join(sorted(found))
    lines.append(parent + (f"{{{names}}}" if len(found) > 1 else names))
  if len(lines) > limit:
    lines[limit - 1 :] = [f"and {len(lines) - limit + 1} more"]
  return lines
