"""Checkpoint files: `.npz` archives with the keys of Google's ViT.

The keys are the paths of a parameter tree joined with '/', in the numbering of
the published checkpoints; statistics are under `batch_stats/`. Which of them a
model takes is `pretrained`'s affair.
"""

from collections.abc import Collection, Mapping
import contextlib
import dataclasses
import os
import re
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from rescalevit_jax import errors

STATS = "batch_stats/"
BLOCK = re.compile(r"(Transformer/encoderblock_(\d+)/)([^/]+)(/.*)")

_PREFIXES = ("", "params/", "opt/target/", "optimizer/target/")
# Newer checkpoints count the modules of a block class by class.
_OLD_NUMBERING = {
  "LayerNorm_1": "LayerNorm_2",
  "MlpBlock_0": "MlpBlock_3",
  "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A file's content.

  Attributes:
    arrays: by key, without prefix and in the old numbering; float types are
      float32, integer types as stored.
    names: the name in the file of each of those keys.
    outside: names without the prefix of the weights (an optimizer's state);
      these arrays are not read.
  """

  arrays: dict[str, np.ndarray]
  names: dict[str, str]
  outside: tuple[str, ...]


def read(path: str) -> Checkpoint:
  """Reads a checkpoint; see `pretrained.load` for what it may look like.

  Raises:
    UserError: the file is missing, damaged, or not a ViT checkpoint.
  """
  with _open(path) as npz:
    if len(set(npz.files)) < len(npz.files):
      raise errors.UserError(f"{path}: holds several arrays of one name")
    prefix = _prefix(path, npz.files)
    arrays, names, outside = {}, {}, []
    for name in npz.files:
      if not name.startswith((prefix, STATS)):
        outside.append(name)
        continue
      stats = STATS if name.startswith(STATS) else ""
      key = stats + _old_numbering(name.removeprefix(stats or prefix))
      if key in names:
        raise errors.UserError(
          f"{path}: holds {key} twice, as {names[key]} and {name}"
        )
      names[key] = name
      arrays[key] = _member(path, npz, name)
  return Checkpoint(arrays, names, tuple(outside))


def write(path: str, arrays: Mapping[str, Any]) -> None:
  """Writes arrays under their keys; the file appears only when complete.

  Raises:
    UserError: the file cannot be written.
  """
  partial = f"{path}.partial-{os.getpid()}"
  try:
    with open(partial, "wb") as f:
      np.savez(f, **arrays)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  except OSError as e:
    raise errors.UserError(
      f"{path}: cannot be written ({e.strerror or e}); choose another place"
    ) from e
  finally:
    with contextlib.suppress(OSError):
      os.remove(partial)


def _open(path: str) -> np.lib.npyio.NpzFile:
  if not os.path.exists(path):
    raise errors.UserError(
      f"{path}: no such file; give the path of an .npz checkpoint"
    )
  if not os.path.isfile(path):
    kind = "a folder" if os.path.isdir(path) else "not a file"
    raise errors.UserError(
      f"{path}: this is {kind}; give the path of an .npz checkpoint"
    )
  try:
    with open(path, "rb") as f:
      start = f.read(6)
    if not start:
      raise ValueError("it is empty")
    if start == b"\x93NUMPY":
      raise ValueError("it is a single array (.npy)")
    if not zipfile.is_zipfile(path):
      cut = start.startswith(b"PK")
      raise ValueError("it is truncated" if cut else "it is not a zip archive")
    return np.load(path, allow_pickle=False)
  except Exception as e:  # A damaged archive can fail in a dozen ways.
    raise errors.UserError(
      f"{path}: not a readable .npz ({_one_line(e)}); get the file again"
    ) from e


def _member(path: str, npz: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
  try:
    array = npz[name]
    if not isinstance(array, np.ndarray):
      raise ValueError("it is not an array")
  except Exception as e:  # As above, and pickled objects.
    raise errors.UserError(
      f"{path}: {name} cannot be read ({_one_line(e)}); get the file again"
    ) from e
  if array.dtype == np.dtype("V2"):  # What numpy makes of a saved bfloat16.
    array = array.view(ml_dtypes.bfloat16)
  elif array.dtype.kind in "iu":
    return array
  elif array.dtype.kind != "f":
    raise errors.UserError(
      f"{path}: {name} has dtype {array.dtype}, but weights are numbers"
    )
  with np.errstate(over="ignore"):  # The loader refuses infinite values.
    return array.astype(np.float32, copy=False)


def _prefix(path: str, names: Collection[str]) -> str:
  """Returns the common prefix of the weights, such as 'params/' or ''."""
  anchor = "embedding/kernel"
  found = [
    name.removesuffix(anchor)
    for name in names
    if f"/{name}".endswith(f"/{anchor}")
  ]
  for prefix in _PREFIXES:
    if prefix in found:
      return prefix
  if len(found) == 1:
    return found[0]
  if found:
    raise errors.UserError(
      f"{path}: holds several models ({', '.join(sorted(found)[:3])}); keep"
      " one of them"
    )
  raise errors.UserError(
    f"{path}: not a ViT checkpoint in Google's naming: embedding/kernel is"
    f" not among its {len(names)} keys ({', '.join([*names][:3])})"
  )


def _old_numbering(key: str) -> str:
  match = BLOCK.fullmatch(key)
  if not match:
    return key
  block, _, slot, rest = match.groups()
  return block + _OLD_NUMBERING.get(slot, slot) + rest


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
