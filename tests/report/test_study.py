"""RescaleViT's study: runs, tables and plots."""

import json
import os

import fake_runs
import numpy as np
from PIL import Image
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.report import study
from rescalevit_jax.report import study_page
from rescalevit_jax.sweep import execution
from rescalevit_jax.sweep import outcome as outcome_lib


def test_a_study_of_two_norms_on_digits(
  digits_dir, shared_dir, tmp_path, monkeypatch, capsys
):
  for name, value in tiny_sweep.environment(shared_dir).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(
    execution.device_slots, "find", lambda jobs: [{} for _ in range(jobs)]
  )
  keys = [*tiny_sweep.KEYS, f"tfds_data_dir={digits_dir}", "image_size=8"]
  command = [
    *("--dataset=digits", "--models=ViT-XS_2", "--norms=LN,Rescale"),
    *(f"--runs_dir={tmp_path}", "--jobs=2"),
    *(f"--config.{key}" for key in keys),
  ]
  assert study.main(command) == 0
  names = {p.name for p in tmp_path.iterdir() if p.is_file()}
  assert names == {
    *("report.md", "report.csv", "report.tex", "report.html", "runs.csv"),
    *("study.md", "curves-ViT-XS_2.png", "attention-ViT-XS_2.png"),
  }
  text = (tmp_path / "study.md").read_text()
  for norm in ("LN", "Rescale"):
    path = tmp_path / f"digits-ViT-XS_2-{norm}-scratch-seed0" / "result.json"
    last = 100 * json.loads(path.read_text())["last_accuracy"]
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {norm} |")]
    assert f"| {last:.1f} | – | – |" in line and line.endswith("| 1 finished |")
  for kind in ("curves", "attention"):
    assert f"({kind}-ViT-XS_2.png)" in text
    pixels = np.asarray(Image.open(tmp_path / f"{kind}-ViT-XS_2.png"))
    assert pixels.std() > 10
  assert str(tmp_path / "study.md") in capsys.readouterr().out
  assert "No attention" not in text and "not run" not in text


@pytest.fixture
def planned():
  """Return the configs of a study of ViT-B_32 on cifar10."""
  configs = []
  for norm, path in (
    ("LN", "weights/ViT-B_32.npz"),
    *((norm, None) for norm in ("LN", "BN", "GN", "Rescale")),
  ):
    config = config_lib.default()
    config.model_name, config.model.norm = "ViT-B_32", norm
    config.pretrained_path = path
    configs.append(config)
  return configs


def test_missing_runs_have_a_row_with_published_results(planned, tmp_path):
  rescale, bn = planned[4], planned[2]
  for seed, accuracy in enumerate((0.62, 0.66)):
    fake_runs.write(
      tmp_path / f"{seed}",
      config_lib.flatten(rescale) | {"seed": seed},
      {"best_accuracy": accuracy, "seconds": 600.0},
    )
  fake_runs.write(tmp_path / "bn", config_lib.flatten(bn))
  paths = study_page.write(planned, tmp_path, 0)
  assert [p.name for p in paths] == ["study.md", "curves-ViT-B_32.png"]
  text = (tmp_path / "study.md").read_text()
  rows = [line.split(" | ") for line in text.splitlines() if "| " in line][2:]
  assert [row[0].removeprefix("| ") for row in rows] == (
    ["LN", "LN, pretrained", "BN", "GN", "Rescale"]
  )
  assert rows[0][1:] == ["–", "–", "67.6", "67.5", "–", "68.5", "not run |"]
  assert rows[2][7] == "step 300 of 20000 |"
  assert rows[4][1:7] == ["64.0 ± 2.8", "40.0 ± 0.00"] + (
    ["66.1", "66.0", "10.0", "66.7"]
  )
  assert rows[4][7] == "2 finished |"
  lines = [x for x in text.splitlines() if x.startswith("- ")]
  assert lines[:3] == [
    "- LN: not run",
    "- LN, pretrained: not run",
    "- GN: not run",
  ]
  assert len(lines) == 5 and all(
    x.startswith(f"- No attention of {norm}: no best checkpoint")
    for norm, x in zip(("BN", "Rescale"), lines[3:], strict=True)
  )


def test_attention_maps_of_norms_with_weights(
  tiny_config, tmp_path, monkeypatch
):
  drawn, draw = [], attention_plots.draw

  def record(kind, models, images):
    names = [(m.model.config.norm, m.name) for m in models]
    drawn.append((kind, names, images))
    return draw(kind, models, images)

  monkeypatch.setattr(attention_plots, "draw", record)
  configs = []
  for norm in ("Rescale", "LN", "BN"):
    config = tiny_config.copy_and_resolve_references()
    config.model.norm = norm
    configs.append(config)
    if norm != "BN":
      workdir = fake_runs.write_with_checkpoint(tmp_path / norm, config)
    if norm == "LN":
      (workdir / "result.json").unlink()
  study_page.write(configs, tmp_path, 7)
  ((kind, models, images),) = drawn
  assert kind == "tokens" and [x.shape for x in images] == [(8, 8, 3)] * 2
  started = "from scratch, step 300 of 12"
  assert models == [("LN", started), ("Rescale", "from scratch")]
  assert "- BN: not run" in (tmp_path / "study.md").read_text()
  study_page.write(configs, tmp_path, 10**6)
  text = (tmp_path / "study.md").read_text()
  assert "- No attention: digits has no test image 1000000" in text


@pytest.mark.parametrize(
  "key, values", [("base_lr", (0.1, 0.2)), ("image_size", (8, 16))]
)
def test_runs_of_a_grid_are_distinguished(
  key, values, tiny_config, tmp_path, monkeypatch
):
  """Labels contain the setting; the state column shows missing seeds."""
  names, configs = [], []
  monkeypatch.setattr(
    attention_plots,
    "draw",
    lambda kind, models, image: names.extend(m.name for m in models),
  )
  for value in values:
    for seed in (0, 1):
      config = tiny_config.copy_and_resolve_references()
      config[key], config.seed = value, seed
      configs.append(config)
    fake_runs.write_with_checkpoint(tmp_path / f"{value}", config)
  study_page.write(configs, tmp_path, 0)
  assert names == [f"from scratch, {key}={value}" for value in values]
  assert (tmp_path / "study.md").read_text().count("| 1 of 2 finished |") == 2


@pytest.mark.parametrize(
  "outcome, begun, written",
  [
    (outcome_lib.Outcome(stopped=True), True, False),
    (outcome_lib.Outcome(stopped=True, out_of_time=True), True, True),
    (outcome_lib.Outcome(stopped=True, out_of_time=True), False, False),
    (outcome_lib.Outcome(failed=[(None, "error: broke")]), True, True),
  ],
)
def test_files_are_written_unless_a_signal_stops(
  outcome, begun, written, tmp_path, monkeypatch
):
  calls = []

  def execute(runs, runs_dir, *, jobs, minutes):
    calls.append((len(runs), os.fspath(runs_dir), jobs, minutes))
    if begun:
      fake_runs.write(runs[0].workdir)
    return outcome

  monkeypatch.setattr(execution, "execute", execute)
  monkeypatch.setattr(study.output, "write", lambda *args: ("", []))
  monkeypatch.setattr(
    study.study_page, "write", lambda *args: calls.append(args) or []
  )
  code = study.main(
    ["--weights=w", "--minutes=5", "--jobs=3", f"--runs_dir={tmp_path}"]
  )
  assert code == outcome.exit_code
  assert calls[0] == (20, str(tmp_path), 3, 5.0)
  assert len(calls) == 1 + written


def test_an_invalid_flag_is_one_line(capsys):
  assert study.main(["--minuts=5"]) == 2
  assert "--minutes" in capsys.readouterr().err.splitlines()[-1]
  with pytest.raises(SystemExit):
    study.main(["--index=-1", "--dry_run"])
  assert "integer >= 0" in capsys.readouterr().err.splitlines()[-1]
