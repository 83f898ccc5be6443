"""The report: its files, notes and errors."""

import html
import os
import pathlib
import re
import shutil
import subprocess
import sys

import fake_runs
import pytest

from rescalevit_jax.report import command_line
from rescalevit_jax.runtime import terminal

FILES = ("report.md", "report.csv", "report.tex", "runs.csv", "report.html")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
  monkeypatch.setattr(terminal, "log_to_stderr", lambda: None)


@pytest.fixture
def runs(tmp_path):
  """Write three finished runs, an unfinished and a damaged one."""
  folder = tmp_path / "runs"
  fake_runs.write(folder / "a", {"seed": 0}, {"best_accuracy": 0.75})
  fake_runs.write(folder / "b", {"seed": 1}, {"best_accuracy": 0.77})
  other = {"model.norm": "BN", "model_name": "ViT-B_32"}
  fake_runs.write(folder / "c", other, {"devices": ["cpu"]})
  fake_runs.write(folder / "open <i> & co", {"seed": 3}, None)
  damaged = fake_runs.write(folder / "bad $x <b>", {}, None)
  (damaged / "config.json").write_text("<script>")
  return folder


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
  return tmp_path_factory.mktemp("saved")


@pytest.fixture
def digits_runs(saved_runs, tiny_config):
  """Write runs of two norms, with initial weights."""
  for norm in ("LN", "Rescale"):
    workdir = saved_runs / f"{norm} $x$ & <co>"
    if not workdir.exists():
      tiny_config.model.norm = norm
      fake_runs.write_with_checkpoint(workdir, tiny_config)
  return saved_runs


def test_report_writes_files_and_prints_the_table(runs, tmp_path, capsys):
  out = tmp_path / "new" / "out"
  assert (
    command_line.main([str(runs), f"--output={out}", "--no_attention"]) == 0
  )
  assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
  assert not any((runs / name).exists() for name in FILES)
  printed = capsys.readouterr().out
  table = (out / "report.md").read_text()
  lines = [line for line in printed.splitlines() if line.startswith("|")]
  assert len(lines) == 4 and "\n".join(lines) in table
  assert "76.0 ± 1.4" in table
  assert printed.splitlines()[-5:] == [str(out / name) for name in FILES]
  page = (out / "report.html").read_text()
  assert "76.0 ± 1.4" in page and page.count("<svg") == 2
  assert "Attention" not in page


def test_notes_are_in_both_files(runs, capsys):
  assert command_line.main([str(runs), "--no_attention"]) == 0
  text = (runs / "report.md").read_text()
  page = html.unescape((runs / "report.html").read_text())
  for words in (
    "3 finished runs of 2 recipes; 0 diverged, 1 unfinished, 0 not begun, 1"
    " damaged.",
    "selected on the test set",
    "best of 200 evaluations, one RTX 3090, fp16",
    "Hardware: 2 x H100 (2 runs); 1 x cpu (1 run).",
    "Software: python 3.11, jax 0.10.",
  ):
    assert words in text
    assert words in page
  assert "share a seed" not in text


@pytest.mark.parametrize(
  "dtypes", [("float32", "bfloat16"), ("bfloat16 then float32",)]
)
def test_dtypes_of_one_recipe_are_noted(dtypes, tmp_path, capsys):
  for seed, dtype in enumerate(dtypes):
    result = fake_runs.RESULT | {"dtype": dtype}
    fake_runs.write(tmp_path / f"run{seed}", {"seed": seed}, result)
  command_line.main([str(tmp_path), "--no_attention"])
  text = (tmp_path / "report.md").read_text()
  assert "run0 and its other seeds ran in several dtypes: bfloat16" in text


def test_repeated_seeds_are_noted(runs, capsys):
  fake_runs.write(runs / "again", {"seed": 1}, {})
  command_line.main([str(runs), "--no_attention"])
  text = (runs / "report.md").read_text()
  assert "Runs that share a seed, each counted: a, again, b." in text


def test_runs_outside_the_means_are_listed_and_escaped(runs, capsys):
  command_line.main([str(runs), "--no_attention"])
  for name in ("report.md", "report.html"):
    text = (runs / name).read_text()
    assert "open &lt;i&gt; &amp; co: step 300 of 20000" in text
    assert "bad $x &lt;b&gt;/config.json: damaged" in text
    assert "<i>" not in text and "<b>" not in text


def test_a_run_that_has_not_started_is_not_damaged(runs, capsys):
  (runs / "new").mkdir()
  (runs / "new" / "log.txt").write_text("--- start\nerror: no weights\n")
  command_line.main([str(runs), "--no_attention"])
  for name in ("report.md", "report.html"):
    text = (runs / name).read_text()
    assert "1 unfinished, 1 not begun, 1 damaged." in text
    assert "Not begun" in text and "new: error: no weights" in text


def test_names_with_undecodable_bytes_are_escaped(tmp_path, capsys):
  runs = os.fsdecode(os.fsencode(tmp_path) + b"/runs \xff")
  for i, name in enumerate((b"a\xfe", b"b\xfd")):
    folder = pathlib.Path(runs, os.fsdecode(name))
    fake_runs.write(folder, {"seed": i}, {} if i else None)
  assert command_line.main([runs, "--no_attention"]) == 0
  text = pathlib.Path(runs, "report.md").read_text()
  assert r"a\udcfe: step 300" in text


def test_published_curves_are_beside_runs_of_the_recipe(runs):
  assert command_line.main([str(runs), "--no_attention"]) == 0
  assert "BN, published" in (runs / "report.html").read_text()


def test_runs_with_held_out_images_have_pictures_of_their_own(runs):
  changes = {"dataset": "cifar10", "data.num_val": 500, "seed": 7}
  fake_runs.write(runs / "held out", changes, {})
  assert command_line.main([str(runs), "--no_attention"]) == 0
  page = (runs / "report.html").read_text()
  assert "tested on 500 held-out training images" in page
  assert page.count("<svg") == 3


def test_report_without_finished_runs(tmp_path, capsys):
  fake_runs.write(tmp_path / "a", {}, None)
  assert command_line.main([str(tmp_path)]) == 0
  assert "No finished run." in capsys.readouterr().out
  page = (tmp_path / "report.html").read_text()
  assert "a: step 300 of 20000" in page
  assert page.count("<svg") == 1
  assert (tmp_path / "report.csv").read_text() == ""


def test_an_error_is_one_line(runs, tmp_path, capsys):
  (tmp_path / "x").write_text("a file")
  output = f"--output={tmp_path / 'x' / 'y'}"
  assert command_line.main([str(runs), "--no_attention", output]) == 1
  captured = capsys.readouterr()
  assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
  assert not captured.out


def test_a_missing_folder_is_an_error(tmp_path, capsys):
  assert command_line.main([str(tmp_path / "none")]) == 1
  assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("index", ["-1", "x"])
def test_an_invalid_index_is_an_error(index, runs, capsys):
  with pytest.raises(SystemExit) as e:
    command_line.main([str(runs), f"--index={index}"])
  assert e.value.code == 2
  assert "--index" in capsys.readouterr().err


def test_attention_maps_depend_on_the_index(digits_runs, tmp_path, capsys):
  page, again, other = (
    _page(digits_runs, tmp_path / str(i), index)
    for i, index in enumerate((3, 3, 4))
  )
  assert page == again
  pictures = [re.findall(r'src="data:.*?"', text) for text in (page, other)]
  assert not set(pictures[0]) & set(pictures[1])
  alts = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', page)
  assert len(alts) == 2
  assert "rollout" not in alts[0] and "rollout" in alts[1]
  for alt in map(html.unescape, alts):
    assert "test image 3" in alt
    assert "LN $x$ & <co>, Rescale $x$ & <co>" in alt
  assert "No map" not in page


def test_a_copy_of_the_runs_gives_the_same_files(runs, tmp_path, capsys):
  copy = tmp_path / "copy" / "runs"
  shutil.copytree(runs, copy)
  command_line.main([str(runs), "--no_attention"])
  command_line.main([str(copy), "--no_attention"])
  for name in FILES:
    assert (runs / name).read_bytes() == (copy / name).read_bytes()


def test_runs_without_a_map_are_listed(digits_runs, tiny_config, tmp_path):
  runs = tmp_path / "runs"
  shutil.copytree(digits_runs, runs)
  (left, right) = sorted(runs.iterdir())
  shutil.rmtree(left / "checkpoints")
  page = html.unescape(_page(runs, tmp_path / "out", 0))
  assert "No map of LN $x$ & <co>: no best checkpoint" in page
  assert page.count("<img") == 2 and "best weights of Rescale $x$" in page
  shutil.rmtree(right / "checkpoints")
  page = html.unescape(_page(runs, tmp_path / "out", 0))
  assert "No map of LN $x$ & <co>, Rescale $x$ & <co>: no best" in page
  assert page.count("<img") == 0 and page.count("<svg") == 1


def test_missing_checkpoint_is_replaced_by_another_seed(digits_runs, tmp_path):
  runs = tmp_path / "runs"
  shutil.copytree(digits_runs, runs)
  run = next(p for p in runs.iterdir() if p.name.startswith("LN"))
  # This run sorts first and has no checkpoint.
  shutil.copytree(run, runs / "A", ignore=lambda *_: {"checkpoints"})
  page = html.unescape(_page(runs, tmp_path / "out", 0))
  assert "best weights of LN $x$ & <co>, Rescale" in page
  assert "No map" not in page


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_maps_require_the_test_image(where, digits_runs, tmp_path):
  runs = tmp_path / "runs"
  shutil.copytree(digits_runs, runs)
  for run in runs.iterdir():
    path = run / "config.json"
    text = path.read_text()
    if where:
      old = re.search(r'"tfds_data_dir": ".*"', text).group()
      text = text.replace(old, f'"tfds_data_dir": "{tmp_path / where}"')
    path.write_text(text)
  page = html.unescape(_page(runs, tmp_path / "out", 10**6))
  reason = "is not prepared in" if where else "no test image 1000000"
  assert "No maps: " in page and reason in page
  assert not (tmp_path / "nowhere").exists()
  assert page.count("<img") == 0 and page.count("<svg") == 1


def test_module_runs_as_a_command(runs, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "rescalevit_jax.report", runs, "--no_attention"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0
  assert done.stdout.startswith("| dataset |")
  assert "left out: " in done.stderr and "Traceback" not in done.stderr


def _page(runs, out, index):
  assert (
    command_line.main([str(runs), f"--output={out}", f"--index={index}"]) == 0
  )
  return (out / "report.html").read_text()
