"""Import order of packages, layout of tests and length of scripts."""

import ast
from collections.abc import Iterator
import pathlib

import paths

PACKAGE = paths.ROOT / "rescalevit_jax"
# Each package imports only from those after it.
ORDER = (
  "main",
  "predict",
  "export",
  "report",
  "benchmark",
  "sweep",
  "analysis",
  "training",
  "pretrained",
  "runs",
  "config",
  "data",
  "models",
  "optim",
  "augment",
  "distributed",
  "runtime",
  "errors",
)


def imported(path: pathlib.Path) -> Iterator[str]:
  """Yield the full names that a module imports from this package."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        if name.startswith("rescalevit_jax."):
          yield name
    elif isinstance(node, ast.Import):
      for alias in node.names:
        assert not alias.name.startswith("rescalevit_jax"), (path, alias.name)


def test_imports_between_packages_run_one_way():
  upward = []
  for path in PACKAGE.rglob("*.py"):
    importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if importer == "__init__":
      continue
    for name in imported(path):
      target = name.split(".")[1]
      if target == importer:
        continue
      if ORDER.index(target) < ORDER.index(importer):
        upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
  assert not upward


def test_order_lists_every_package():
  found = {
    path.name.removesuffix(".py")
    for path in PACKAGE.iterdir()
    if not path.name.startswith("__")
  }
  assert found - {"py.typed"} == set(ORDER)


def test_tests_mirror_the_packages():
  folders = {path.name for path in (paths.ROOT / "tests").iterdir()}
  packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert packages <= folders


def test_scripts_are_short():
  for path in (paths.ROOT / "scripts").glob("*.py"):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path
