"""Where the reference numbers lie, and how tests read them.

The numbers were recorded from the original PyTorch code and from Google's code;
the README beside the full set tells what each array is. The full set lies
beside the checkout, in `../shared/parity`; every clone has a part of it in
`tests/data`, made by `tests/data/reduce.py`, under the same names and keys. A
check whose numbers are in neither is skipped and says so.
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
  """Returns a file of the reference numbers, or skips the calling test.

  Args:
    name: of the file, such as 'google.npz' or 'param_counts.json'.
    source: 'full', 'reduced', or None for the full one where it is there.
  """
  if source != "reduced" and (FULL / name).exists():
    return FULL / name
  if source == "full":
    pytest.skip(f"the full {name} is not beside this checkout")
  if not (REDUCED / f"{name}.xz").exists():
    pytest.skip(f"{name} is not in the reduced set")
  return _unpack(name)


class Arrays(Mapping):
  """The arrays of an `.npz`; a key that the file lacks skips the test."""

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
    """Returns the arrays whose keys start with `prefix`, without it.

    Skips the test where there are none.
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
  """Returns the arrays of an `.npz`; see `path`."""
  return _load(path(name, source))


def table(name: str, source: str | None = None) -> dict:
  """Returns the content of a `.json`; see `path`."""
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
