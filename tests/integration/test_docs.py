"""docs/walkthrough.md, run as it stands; without --slow in fewer steps."""

import os
import pathlib
import re
import subprocess
import sys

import paths
import pytest
import tiny_sweep

PAGE = paths.ROOT / "docs" / "walkthrough.md"


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, digits_dir, shared_dir):
  """What a reader has in front of her, and what the page leaves there."""
  folder = tmp_path_factory.mktemp("walkthrough")
  for name in ("configs", "scripts"):
    (folder / name).symlink_to(paths.ROOT / name)
  blocks = re.findall(
    r"^```(bash|python)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
  )
  assert len(blocks) >= 6
  if not request.config.option.slow:
    whole, cut = (f"--config.total_steps={x}" for x in ("100", "20"))
    assert sum(whole in text for _, text in blocks) == 2
    cut += " --config.warmup_steps=5 --config.progress_every=5"
    seeds, seed = "--grid seed=0,1", "--grid seed=0"
    assert sum(seeds in text for _, text in blocks) == 1
    blocks = [
      (x, text.replace(whole, cut).replace(seeds, seed)) for x, text in blocks
    ]
  environment = {
    **tiny_sweep.environment(shared_dir),
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "TFDS_DATA_DIR": str(digits_dir),
  }
  for language, text in blocks:
    command = {
      "bash": ["bash", "-euc", text],
      "python": [sys.executable, "-c", text],
    }[language]
    done = subprocess.run(
      command,
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
  return folder / "runs" / "walk"


def test_leaves_what_it_says(folder, request):
  assert (folder / "one" / "result.json").exists()
  runs = [path.parent.name for path in folder.glob("norms/*/result.json")]
  assert len(runs) == (4 if request.config.option.slow else 2)
  table = (folder / "norms" / "report.md").read_text()
  assert "| LN " in table and "| Rescale " in table
  assert "<svg" in (folder / "norms" / "report.html").read_text()
  for name in ("curves.png", "curves.svg", "attention/class_token.png"):
    assert (folder / name).stat().st_size > 5000
  lines = (folder / "attention" / "attention.csv").read_text().splitlines()
  assert len(lines) == 1 + 2 * 4  # Two models of four blocks.
  lines = (folder / "predictions.csv").read_text().splitlines()
  assert len(lines) == 1 + 5


@pytest.mark.parametrize(
  "page",
  [paths.ROOT / "README.md", *sorted(paths.ROOT.glob("docs/*.md"))],
  ids=str,
)
def test_links_lead_somewhere(page):
  targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
  for target in targets:
    if not target.startswith("https://"):
      assert (page.parent / target).exists(), target
