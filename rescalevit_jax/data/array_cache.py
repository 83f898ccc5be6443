"""Decoded arrays kept on disk, so that the next start need not decode again.

`${XDG_CACHE_HOME:-~/.cache}/rescalevit_jax/NAME-FINGERPRINT/*.npz`. Everything
in there can be deleted at any time.
"""

from collections.abc import Mapping
import hashlib
import logging
import os
import pathlib

import numpy as np

from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cache

_log = logging.getLogger(__name__)
# Part of the fingerprint; to be raised when the same files shall decode to
# other arrays.
_DECODER = 1


def folder(name: str, source: str | os.PathLike[str]) -> pathlib.Path:
  """Names the folder for the arrays decoded from a folder of files.

  Args:
    name: first part of the folder's name.
    source: folder of the files. Another place, or any file added, removed,
      resized or touched, gives another name.
  """
  files = sorted(
    (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
    for entry in os.scandir(source)
  )
  key = repr((_DECODER, os.path.realpath(source), files))
  fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
  return cache.root() / f"{name}-{fingerprint}"


def load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Reads what `save` wrote; None if it is not there or damaged."""
  try:
    # A zip file's checksums tell damage anywhere in the arrays.
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    return None
  except Exception as e:  # zipfile and numpy raise all sorts.
    _log.info("ignoring %s: %s", path, e)
    return None


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays, all or nothing; what stops it is only logged."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path) as f:
      np.savez(f, **arrays)
    _log.info("kept for the next start: %s", path)
  except OSError as e:
    _log.info("not kept for the next start: %s", e)
