"""The programs in scripts/, as modules."""

import importlib.util
import pathlib
import sys
import types

FOLDER = pathlib.Path(__file__).parents[1] / "scripts"


def load(name: str) -> types.ModuleType:
  """Imports scripts/NAME.py."""
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  script = importlib.util.module_from_spec(spec)
  sys.modules[name] = script  # Where dataclasses look their module up.
  spec.loader.exec_module(script)
  return script
