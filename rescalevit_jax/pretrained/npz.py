"""Read and write `.npz` files with the keys of Google's ViT checkpoints."""

from collections.abc import Collection, Mapping
import dataclasses
import os
from typing import Any

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import untrusted_npz
from rescalevit_jax.runtime import atomic_file

_PREFIXES = ("", "params/", "opt/target/", "optimizer/target/")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The content of a file.

  Attributes:
    arrays: arrays by key, without prefix and in the old numbering. Floats are
      float32, integers have the stored type.
    names: the name in the file, by key.
    outside: names without the prefix of the weights, such as an optimizer's
      state. These arrays are not read.
  """

  arrays: dict[str, np.ndarray]
  names: dict[str, str]
  outside: tuple[str, ...]


def read(path: str, max_bytes: int | None = None) -> Checkpoint:
  """Read a checkpoint in Google's naming, with the old or new numbering.

  All its weights may have a prefix, such as `params/`. `max_bytes` is explained
  in `untrusted_npz.Archive`; a type conversion temporarily needs up to 50 %
  more memory.
  """
  arrays: dict[str, np.ndarray] = {}
  names: dict[str, str] = {}
  outside = []
  with untrusted_npz.open_archive(path, max_bytes) as archive:
    prefix = _prefix(path, archive.names)
    for name in archive.names:
      if not name.startswith((prefix, param_keys.STATS)):
        outside.append(name)
        continue
      stats = param_keys.STATS if name.startswith(param_keys.STATS) else ""
      key = stats + param_keys.old_numbering(name.removeprefix(stats or prefix))
      if key in names:
        raise errors.UserError(
          f"{path}: holds {key} twice, as {names[key]} and {name}; keep one of"
          " them"
        )
      names[key] = name
      arrays[key] = archive.read(name)
  return Checkpoint(arrays, names, tuple(outside))


def save(
  path: str | os.PathLike[str],
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
) -> None:
  """Write weights to an `.npz` file under Google's names, atomically.

  No suffix is added to the path, and statistics are under `batch_stats/`.
  """
  try:
    with atomic_file.replacing(path) as f:
      np.savez(f, **param_keys.flatten(params, batch_stats))
  except OSError as e:
    raise errors.UserError(
      f"{os.fspath(path)}: cannot be written ({e.strerror or e}); choose"
      " another path"
    ) from e


def _prefix(path: str, names: Collection[str]) -> str:
  """Return the common prefix of the weights, such as 'params/' or ''."""
  anchor = "embedding/kernel"
  found = [
    name.removesuffix(anchor)
    for name in names
    if f"/{name}".endswith(f"/{anchor}")
  ]
  known = [prefix for prefix in _PREFIXES if prefix in found]
  if known or len(found) == 1:
    return (known or found)[0]
  if found:
    raise errors.UserError(
      f"{path}: holds several models ({', '.join(sorted(found)[:3])}); keep"
      " one of them"
    )
  raise errors.UserError(
    f"{path}: not a ViT checkpoint in Google's naming: embedding/kernel is"
    f" missing from its {len(names)} keys ({', '.join([*names][:3])}); give the"
    " path of another file"
  )
