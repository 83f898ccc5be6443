"""Plots of diagnostics and their command."""

import json

import fake_runs
import numpy as np
import pytest

from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plot_diagnostics
from rescalevit_jax.analysis import probe_plots
from rescalevit_jax.report import command_line
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import terminal

STEPS = (1, 100, 200, 300)
PARTS = ("embedding", "block_00", "block_01", "head")


def line(step):
  """Write a run with two blocks; values grow with step and depth."""
  values = {"clipped_share": 0.25, "effective_lr": 0.01 * step}
  for depth, part in enumerate(PARTS):
    values[f"{part}/grad_norm"] = step * 10.0**depth
    if part != "head":
      values[f"{part}/stream_rms_cls"] = depth + 1.0
      values[f"{part}/stream_mean_cls"] = depth - 1.0
    if "block" in part:
      values[f"{part}/scale_attention"] = depth + 0.5
      values[f"{part}/alpha_mlp"] = depth - step / 300
      values[f"{part}/bn_scale_mlp"] = 1.0
  if step == 300:
    values["block_00/grad_norm"] = "damaged"
    values["block_00/other"] = 1
  if step in (1, 300):
    values |= {"sharpness": -2.0 if step == 1 else 50.0}
  return {"step": step, "block_": 1} | {
    f"diagnostics/{k}": v for k, v in values.items()
  }


@pytest.fixture
def workdir(tmp_path):
  workdir = fake_runs.write(tmp_path / "runs" / "a $x$", {"seed": 3}, {})
  with open(workdir / "metrics.jsonl", "a", encoding="utf-8") as f:
    f.writelines(json.dumps(line(step)) + "\n" for step in STEPS)
  fake_runs.write(tmp_path / "runs" / "without", {}, {})
  return workdir


def panels(figure):
  return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def test_maps_have_depth_upwards_and_time_to_the_right(workdir):
  run = run_reader.read(workdir)
  figure = diagnostics_plots.draw(run, "a $x$")
  found = panels(figure)
  assert list(found) == [
    "Residual stream, class token",
    "Gradient, before clipping",
    "Alpha, MLP",
    "Scale of the norm, attention",
    "Scale of its BatchNorm, MLP",
    "Clipped steps since the last point",
    "Learning rate",
    "Sharpness",
  ]
  ax = found["Gradient, before clipping"]
  (mesh,) = ax.collections
  values = mesh.get_array()
  assert values.shape == (4, 4)
  np.testing.assert_allclose(values[2], np.array(STEPS) * 100.0)
  assert values.mask[1].tolist() == [False, False, False, True]
  assert values.mask.sum() == 1
  ticks = [tick.get_text() for tick in ax.get_yticklabels()]
  assert ticks == ["embedding", "0", "1", "head"]
  edges = mesh.get_coordinates()[0, :, 0]
  np.testing.assert_allclose(edges, [0, 50.5, 150, 250, 350])
  *blocks, zero = found["Alpha, MLP"].lines
  for depth, block in enumerate(blocks, start=1):
    np.testing.assert_array_equal(block.get_xdata(), STEPS)
    want = depth - np.array(STEPS) / 300
    np.testing.assert_allclose(block.get_ydata(), want)
  assert len({block.get_color() for block in blocks}) == 2
  assert list(zero.get_ydata()) == [0, 0]
  shares = found["Clipped steps since the last point"].lines[0]
  np.testing.assert_allclose(shares.get_ydata(), 25)
  above, below = found["Sharpness"].lines
  assert (list(above.get_xdata()), list(above.get_ydata())) == ([300], [50])
  assert (list(below.get_xdata()), list(below.get_ydata())) == ([1], [2])
  assert figure.get_suptitle() == (r"a \$x\$: LN, ViT-B_16 on cifar10, seed 3")


def test_models_are_compared_in_one_plot():
  numbers = {key.removeprefix("diagnostics/"): x for key, x in line(1).items()}
  models = [
    ("a", "LN", numbers | {"grad_norm": 2.0}),
    ("b", "LN", numbers | {"grad_norm": 0.0, "sharpness": 4.0}),
  ]
  found = panels(probe_plots.compare(models, clip=1.0))
  first, second = found["Gradient, before clipping"].lines
  np.testing.assert_allclose(first.get_ydata(), [1, 10, 100, 1000])
  assert first.get_color() == second.get_color()
  assert first.get_linestyle() != second.get_linestyle()
  *points, clip = found["Whole gradient, before clipping"].lines
  assert [point.get_ydata()[0] for point in points] == [2, 0]
  assert list(clip.get_ydata()) == [1, 1]
  ticks = found["Gradient, before clipping"].get_xticklabels()
  words = {tick.get_text(): tick.get_position()[0] for tick in ticks}
  assert words == {"in": -1, "0": 0, "1": 1, "head": 2}


def test_each_run_has_plots(workdir, capsys):
  assert plot_diagnostics.main([f"--workdir={workdir.parent}"]) == 0
  paths = [workdir / f"diagnostics.{kind}" for kind in ("png", "svg")]
  assert all(path.stat().st_size > 5000 for path in paths)
  assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
  assert not list(workdir.parent.glob("without/*.png"))


def test_the_report_contains_diagnostics(
  workdir, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(terminal, "log_to_stderr", lambda: None)
  flags = [f"--output={tmp_path}", "--no_attention"]
  assert command_line.main([str(workdir.parent), *flags]) == 0
  page = (tmp_path / "report.html").read_text()
  assert page.count("<h2>Diagnostics</h2>") == 1
  assert page.count("over depth and time, a $x$") == 2  # Alt text and caption.


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--workdir={runs}/without"], "--config.diagnostics_every"),
    (["--workdir={runs}", "--output=a.pdf"], ".png or .svg"),
    (["--workdir={runs}/nowhere"], "no such folder"),
    (["--workdir={runs}", "--output={runs}/a.png"], "one picture for 2 runs"),
  ],
)
def test_errors_are_one_line(flags, words, workdir, capsys):
  if "2" in words:
    other = fake_runs.write(workdir.parent / "b", {}, {})
    (other / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
  flags = [flag.format(runs=workdir.parent) for flag in flags]
  assert plot_diagnostics.main(flags) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith("error: ") and words in error
  assert not list(workdir.parent.rglob("*.png"))
