"""On-disk cache of decoded images, for a fast start of the next run.

The files are `*.npz` in `${XDG_CACHE_HOME:-~/.cache}/rescalevit_jax/`, in one
folder `NAME-FINGERPRINT` per dataset. They can be deleted at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import logging
import os
import pathlib
from typing import Any

import numpy as np

from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cache

_log = logging.getLogger(__name__)
# Part of the fingerprint; increase it when decoding changes.
_DECODER_VERSION = 4


def folder(
  name: str,
  source: str | os.PathLike[str],
  files: Iterable[str | os.PathLike[str]] | None = None,
  class_names: Sequence[str] = (),
) -> pathlib.Path:
  """Return the cache folder for arrays decoded from a folder of files.

  Its name depends on the path of `source`; on the name, size and modification
  time of each file; and on the class names, if the files' names give the
  labels. If `files` is None, all in `source` count, without those behind links.
  """
  if files is None:
    files = pathlib.Path(source).rglob("*")
  stats = sorted(
    (os.path.relpath(path, source), *_size_and_time(path))
    for path in map(pathlib.Path, files)
    if path.is_file() or not path.exists()
  )
  key = repr((_DECODER_VERSION, os.path.realpath(source), stats, *class_names))
  fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
  return cache.root() / f"{name}-{fingerprint}"


def _size_and_time(path):
  """Return size and modification time; (0, 0) of a link to a missing file."""
  if not path.exists():
    return 0, 0
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Load the arrays of `save`; return None if missing or damaged."""
  try:
    # The zip file's checksums detect damage anywhere in the arrays.
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    return None
  except Exception as e:  # zipfile and numpy raise many types.
    _log.info("ignoring %s: %s", path, e)
    return None


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Save arrays atomically; errors are only logged."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path) as f:
      np.savez(f, **arrays)
    _log.info("cached for the next start: %s", path)
  except OSError as e:
    _log.info("not cached for the next start: %s", e)
