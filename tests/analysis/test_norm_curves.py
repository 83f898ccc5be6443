"""The command that plots the output of norms over their input."""

import csv
import types

import jax
import numpy as np
import pytest
import tiny_model

from rescalevit_jax import errors
from rescalevit_jax.analysis import norm_curves
from rescalevit_jax.models import norms
from rescalevit_jax.runtime import terminal

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
SITES = [
  *("block 0, attention", "block 0, MLP"),
  *("block 1, attention", "block 1, MLP"),
  "final norm",
]


def test_curves_exclude_scale_and_bias():
  tiny = tiny_model.create("DyT", num_layers=2)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + rng.uniform(0.5, 1, x.shape).astype(np.float32),
    tiny.variables["params"],
  )
  found = norm_curves.measure(tiny.model, {"params": params}, IMAGES, 8)
  assert list(found) == SITES
  transformer = params["Transformer"]
  for site, block, name in (
    (SITES[0], "encoderblock_0", "DyT_0"),
    (SITES[3], "encoderblock_1", "DyT_2"),
  ):
    alpha = transformer[block][name]["alpha"]
    for x, y in found[site].values():
      np.testing.assert_allclose(y, np.tanh(alpha * x), atol=1e-4)
  # Three images, 16 channels, 4 patches.
  sizes = {token: x.size for token, (x, _) in found[SITES[1]].items()}
  assert sizes == {"class token": 3 * 16, "patches": 3 * 4 * 16}


def test_layer_norm_outputs_are_normalized():
  tiny = tiny_model.create("LN", num_layers=2)  # Scales are 2.
  found = norm_curves.measure(tiny.model, tiny.variables, IMAGES, 8)
  _, y = found["final norm"]["patches"]
  assert np.square(y).mean() == pytest.approx(1, rel=0.01)


def test_plot_and_table_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(terminal, "log_to_stderr", lambda: None)
  monkeypatch.setattr(norm_curves, "_IMAGES", 10**6)  # Exceeds the split.
  drawn = []
  draw = norm_curves.draw
  monkeypatch.setattr(norm_curves, "draw", lambda x: drawn.append(x) or draw(x))
  flags = [f"--workdir={tiny_run}", f"--output={tmp_path}"]
  assert norm_curves.main(flags) == 0
  (models,) = drawn
  (sites,) = models.values()
  paths = [tmp_path / f"norm_curves.{kind}" for kind in ("csv", "png", "svg")]
  assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
  assert (tmp_path / "norm_curves.png").stat().st_size > 5000
  with open(paths[0], encoding="utf-8", newline="") as f:
    rows = list(csv.DictReader(f))
  assert {row["model"] for row in rows} == {tiny_run.name}
  x, y = sites[SITES[3]]["class token"]
  of_site = [
    (float(row["input"]), float(row["output"]))
    for row in rows
    if (row["site"], row["token"]) == (SITES[3], "class token")
  ]
  np.testing.assert_allclose(of_site, np.stack([x, y], 1), rtol=1e-4)


def test_no_models_is_an_error(capsys):
  with pytest.raises(SystemExit):
    norm_curves.main([])
  assert "--workdir or --config" in capsys.readouterr().err


def test_checkpoint_flag_requires_a_run(capsys):
  args = ["--config=configs/quickstart.py", "--checkpoint=best"]
  assert norm_curves.main(args) == 1
  assert "add --workdir" in capsys.readouterr().err


def test_configs_are_checked_before_models_are_loaded(monkeypatch, capsys):
  monkeypatch.delattr(norm_curves.subjects, "load")
  assert norm_curves.main(["--workdir=a", "--config=nowhere.py"]) == 1
  assert "nowhere.py" in capsys.readouterr().err


def test_a_config_without_methods_expands_to_every_norm(
  monkeypatch, tmp_path, capsys
):
  def stop(config):
    raise errors.UserError("stop")

  monkeypatch.setattr(norm_curves.experiment_lib, "create", stop)
  flags = ["--config=configs/quickstart.py", f"--output={tmp_path}"]
  assert norm_curves.main(flags) == 1
  assert f"LN: model 1 of {len(norms.NORMS)}" in capsys.readouterr().err
  assert norm_curves.main([*flags, "--config.model.norm=DyT"]) == 1
  assert "DyT: model 1 of 1" in capsys.readouterr().err


def test_run_and_config_of_equal_name_are_both_drawn(tmp_path, monkeypatch):
  model = types.SimpleNamespace(
    name="LN", model=None, variables=None, image_size=8
  )
  subject = types.SimpleNamespace(model=model, test_split=None)
  drawn = []
  monkeypatch.setattr(norm_curves.subjects, "load", lambda *args: [subject])
  monkeypatch.setattr(norm_curves, "_first", lambda split: None)
  monkeypatch.setattr(norm_curves, "measure", lambda *args: {})
  monkeypatch.setattr(norm_curves, "draw", lambda found: drawn.extend(found))
  monkeypatch.setattr(norm_curves.plots, "save", lambda *args: None)
  flags = ["--workdir=LN", f"--output={tmp_path}"]
  config = "--config=configs/norm_free.py:LN"
  keys = ["--config.dataset=digits", "--config.model.num_layers=1"]
  assert norm_curves.main([*flags, config, *keys]) == 0
  assert len(drawn) == 2
  assert norm_curves.main([*flags, *keys]) == 1
