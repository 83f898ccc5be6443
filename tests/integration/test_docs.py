"""The documentation's notebook runs; its links and commands are valid."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import paths
import pytest
import tiny_sweep

NOTEBOOK = paths.ROOT / "docs" / "walkthrough.ipynb"
PAGES = [
  *paths.ROOT.glob("*.md"),
  *paths.ROOT.glob("docs/**/*.md"),
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, digits_dir, shared_dir):
  """Run the notebook, with fewer steps and one seed unless --slow is set."""
  nbclient = pytest.importorskip("nbclient")
  nbformat = pytest.importorskip("nbformat")
  folder = tmp_path_factory.mktemp("walkthrough")
  (folder / "configs").symlink_to(paths.ROOT / "configs")
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  if not request.config.option.slow:
    for old, new in (
      ("STEPS = 100", "STEPS = 20"),
      ('"0,1"', '"0"'),
      ("short = (", 'short = ("--config.model.num_layers=1",'),
    ):
      found = [cell for cell in notebook.cells if old in cell.source]
      assert len(found) == 1, old
      found[0].source = found[0].source.replace(old, new)
  environment = {
    **tiny_sweep.environment(shared_dir),
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "TFDS_DATA_DIR": str(digits_dir),
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    nbclient.NotebookClient(
      notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()
  return folder / "runs" / "walkthrough"


def test_notebook_writes_its_files(folder, request):
  assert (folder / "one" / "result.json").exists()
  runs = list(folder.glob("norms/*/result.json"))
  assert len(runs) == (4 if request.config.option.slow else 2)
  table = (folder / "norms" / "report.md").read_text()
  assert "| LN " in table and "| Rescale " in table
  assert "<svg" in (folder / "norms" / "report.html").read_text()
  for name in ("curves.png", "attention/class_token.png"):
    assert (folder / name).stat().st_size > 5000
  lines = (folder / "attention" / "attention.csv").read_text().splitlines()
  blocks = 4 if request.config.option.slow else 1
  assert len(lines) == 1 + 2 * blocks  # Two models.


def test_notebook_is_small_and_has_no_outputs():
  text = NOTEBOOK.read_text(encoding="utf-8")
  assert len(text) < 20_000
  assert '"output_type"' not in text


@pytest.mark.parametrize(
  "page", PAGES, ids=lambda x: str(x.relative_to(paths.ROOT))
)
def test_links_are_valid(page):
  targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
  for target in targets:
    if not target.startswith("https://"):
      assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
  "page", PAGES, ids=lambda x: str(x.relative_to(paths.ROOT))
)
def test_commands_and_files_exist(page):
  text = page.read_text()
  for module in set(re.findall(r"-m (rescalevit_jax[.\w]*)", text)):
    assert importlib.util.find_spec(module), module
  pattern = r"\b(?:configs|scripts|tests)/[\w/]+\.\w+"
  for file in set(re.findall(pattern, text)):
    if "results" not in page.parts:  # Recorded commands may be older.
      assert (paths.ROOT / file).exists(), file


def test_architecture_names_existing_files():
  text = (paths.ROOT / "docs" / "architecture.md").read_text()
  files = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text))
  assert len(files) > 20
  for file in files:
    assert (paths.ROOT / "rescalevit_jax" / file).exists() or (
      paths.ROOT / file
    ).exists(), file


def test_readme_fits_on_three_screens():
  assert len((paths.ROOT / "README.md").read_text().splitlines()) <= 150


def test_website_builds_without_warnings(tmp_path):
  pytest.importorskip("mkdocs")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
    cwd=paths.ROOT,
    env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pytest_commands_select_tests(page):
  pattern = r"`pytest(?: --slow)? (tests/[\w/]+\.py)(?: -k (\w+))?`"
  for path, word in re.findall(pattern, page.read_text()):
    text = (paths.ROOT / path).read_text()
    assert re.search(rf"^def test_\w*{word}", text, re.MULTILINE), (path, word)
