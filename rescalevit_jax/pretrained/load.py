"""Load pretrained weights into a model: read, plan, carry out, report.

Loading is strict. Only the differences of `transfer` and the grid of the
position embedding are allowed, and they are reported. Any other is an error.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import os
import re
from typing import Any

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import plan as plan_lib
from rescalevit_jax.pretrained import positions
from rescalevit_jax.pretrained import sigma_kernels
from rescalevit_jax.pretrained import untrusted_npz


@dataclasses.dataclass(frozen=True)
class Report:
  """The outcome for each key. Statistics have the prefix `batch_stats/`.

  `dropped` and `unsupported` are names in the file, all others are keys of the
  model; `summary` explains them. `unsupported` are dropped names whose effect
  the model cannot reproduce. `notes` are reasons, one sentence each.
  """

  loaded: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()
  carried: tuple[str, ...] = ()
  reinitialized: tuple[str, ...] = ()
  derived: tuple[str, ...] = ()
  initial: tuple[str, ...] = ()
  dropped: tuple[str, ...] = ()
  unsupported: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def summary(self) -> str:
    """Return a few lines for the log, with all encoder blocks combined."""
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
  """Load a checkpoint's weights into a freshly initialized model's trees.

  Args:
    path: a file that `npz.read` accepts. Its arrays may take four times the
      model's bytes plus `untrusted_npz.SLACK`.
    params: nested dict; only shape and type of its leaves are used.
    batch_stats: the same for the statistics; may be empty.
    reinit_head: set the head to zeros even if the file's head fits.
    allow_nonfinite: accept weights that are NaN or infinite.

  Returns:
    New trees of the same structure and shapes, and the report. Loaded leaves
    are numpy arrays, float32 (or the model's integer type). Initial leaves are
    the given ones.
  """
  path = os.fspath(path)
  model = param_keys.flatten(params, batch_stats)
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in model.values())
  checkpoint = npz.read(path, 4 * num_bytes + untrusted_npz.SLACK)
  plan = plan_lib.make(checkpoint.arrays, model, reinit_head)
  values = _carry_out(path, plan, checkpoint, model, allow_nonfinite)
  report = _report(plan, checkpoint, model)
  return *param_keys.unflatten(values), report


def _carry_out(path, plan, checkpoint, model, allow_nonfinite):
  """Return the model's arrays by key."""
  arrays = checkpoint.arrays
  if plan.sigma_to_plain:
    try:
      arrays = sigma_kernels.to_plain(arrays)
    except (KeyError, ValueError) as e:
      raise errors.UserError(
        f"{path}: invalid arrays of sigma_reparam ({e}); get the file again"
      ) from e
  values, problems = {}, []
  for key, leaf in model.items():
    if key in plan.zero:
      values[key] = np.zeros(leaf.shape, np.float32)
    elif key not in plan.copy:
      values[key] = leaf
    elif plan.copy[key] not in arrays:
      problems.append(f"{key} is missing, the model's shape is {leaf.shape}")
    else:
      try:
        values[key] = _fit(key, arrays[plan.copy[key]], leaf, allow_nonfinite)
      except ValueError as e:
        problems.append(f"{key} {e}")
  problems += [
    f"{checkpoint.names[key]}, shape {arrays[key].shape}, is not in the model"
    for key in plan.unexpected
  ]
  if problems:
    details = "; ".join(problems[:3])
    if len(problems) > 3:
      details += f"; and {len(problems) - 3} more"
    raise errors.UserError(
      detect.size_mismatch(path, arrays, model, details)
      or detect.position_mismatch(path, arrays, model)
      or f"{path}: does not fit the model: {details}"
    )
  if plan.derive:
    try:
      values |= sigma_kernels.from_plain(values)
    except ValueError as e:
      raise errors.UserError(
        f"{path}: cannot start sigma_reparam ({e}); set"
        " --config.model.sigma_reparam=False"
      ) from e
  return values


def _report(plan, checkpoint, model):
  resized = {
    key
    for key, file_key in plan.copy.items()
    if checkpoint.arrays[file_key].shape != model[key].shape
  }
  notes = list(plan.notes)
  for key in resized:
    old, new = (arrays[key].shape[1] for arrays in (checkpoint.arrays, model))
    notes.append(f"the position embedding went from {old} to {new} tokens")
  carried = {key for key, file_key in plan.copy.items() if key != file_key}
  names = checkpoint.names
  return Report(
    loaded=_sorted(plan.copy.keys() - resized - carried),
    resized=_sorted(resized),
    carried=_sorted(carried),
    reinitialized=_sorted(plan.zero),
    derived=_sorted(plan.derive),
    initial=_sorted(plan.initial),
    dropped=(
      *_sorted(names[key] for key in plan.ignored),
      *_sorted(checkpoint.outside),
    ),
    unsupported=_sorted(names[key] for key in plan.unsupported),
    notes=tuple(notes),
  )


def _sorted(keys: Iterable[str]) -> tuple[str, ...]:
  return tuple(sorted(keys))


def _fit(
  key: str, value: np.ndarray, leaf: Any, allow_nonfinite: bool
) -> np.ndarray:
  """Return value in leaf's shape and type; ValueError if it does not fit."""
  integer = np.issubdtype(leaf.dtype, np.integer)
  dtype = np.dtype(leaf.dtype if integer else np.float32)
  if integer == (value.dtype.kind == "f"):
    raise ValueError(f"has dtype {value.dtype}, the model's is {dtype}")
  if not (allow_nonfinite or np.isfinite(value).all()):
    raise ValueError(
      "has NaN or infinite values; accept them by"
      " --config.pretrained_allow_nonfinite=True"
    )
  if value.shape != leaf.shape:
    mismatch = f"has shape {value.shape}, the model's is {leaf.shape}"
    grid_only = value.ndim == 3 and value.shape[::2] == leaf.shape[::2]
    if key != param_keys.POSITION_EMBEDDING or not grid_only:
      raise ValueError(mismatch)
    try:
      value = positions.resize(value, leaf.shape[1])
    except ValueError as e:
      raise ValueError(f"{mismatch}, and {e}") from e
  found = value.astype(dtype, copy=False)
  if integer and (found != value).any():
    raise ValueError(f"has values that do not fit {dtype}")
  return found


def _grouped(keys: Iterable[str], limit: int = 20) -> list[str]:
  """Return lines such as 'encoderblock_*/norm/{bias,scale}'."""
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
