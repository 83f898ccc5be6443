"""Reference numbers of the original PyTorch code and of Google's code.

The full set is in `../shared/parity` beside the checkout; its README describes
each array. `tests/data/reference` has a reduced set with the same names and
keys, written by `reduce.py`. Tests without reference numbers are skipped.
"""

import atexit
from collections.abc import Mapping
import functools
import json
import lzma
import pathlib
import tempfile

import numpy as np
import paths
import pytest

FULL = paths.SHARED / "parity"
REDUCED = paths.ROOT / "tests" / "data" / "reference"
SOURCES = ("full", "reduced")


def path(name: str, source: str | None = None) -> pathlib.Path:
  """Return the path of a reference file, or skip the calling test.

  Args:
    name: of the file, such as 'google.npz' or 'param_counts.json'.
    source: 'full', 'reduced', or None for the full set with the reduced set as
      fallback.
  """
  if source != "reduced" and (FULL / name).exists():
    return FULL / name
  if source == "full":
    pytest.skip(f"the full {name} is not beside this checkout")
  if not (REDUCED / f"{name}.xz").exists():
    pytest.skip(f"{name} is not in the reduced set")
  return _unpack(name)


class Arrays(Mapping):
  """The arrays of an `.npz` file; a missing key skips the test."""

  def __init__(self, arrays: dict[str, np.ndarray], label: str):
    self._arrays = arrays
    self._label = label

  def __getitem__(self, key: str) -> np.ndarray:
    if key not in self._arrays:
      pytest.skip(f"{self._label} has no {key}")
    return self._arrays[key]

  def __contains__(self, key: object) -> bool:
    return key in self._arrays

  def __iter__(self):
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose keys start with `prefix`, without the prefix.

    Skip the test if there are none.
    """
    found = {
      k.removeprefix(prefix): v
      for k, v in self._arrays.items()
      if k.startswith(prefix)
    }
    if not found:
      pytest.skip(f"{self._label} has nothing under {prefix}")
    return found


def arrays(name: str, source: str | None = None) -> Arrays:
  """Return the arrays of an `.npz` file; see `path`."""
  return _load(path(name, source))


def table(name: str, source: str | None = None) -> dict:
  """Return the content of a `.json` file; see `path`."""
  return json.loads(path(name, source).read_text())


@functools.cache
def _load(file: pathlib.Path) -> Arrays:
  which = "full" if file.is_relative_to(FULL) else "reduced"
  with np.load(file, allow_pickle=False) as content:
    return Arrays(dict(content), f"the {which} {file.name}")


@functools.cache
def _unpack(name: str) -> pathlib.Path:
  file = _folder() / name
  file.write_bytes(lzma.decompress((REDUCED / f"{name}.xz").read_bytes()))
  return file


@functools.cache
def _folder() -> pathlib.Path:
  folder = tempfile.TemporaryDirectory(prefix="parity-")
  atexit.register(folder.cleanup)
  return pathlib.Path(folder.name)
