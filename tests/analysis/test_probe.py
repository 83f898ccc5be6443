"""The command that compares freshly initialized models."""

import csv

from flax import traverse_util
import numpy as np
import paths
import pytest

from rescalevit_jax.analysis import probe
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import vit
from rescalevit_jax.pretrained import npz
from rescalevit_jax.training import experiment
from rescalevit_jax.training import initial_state

CONFIG = """
from rescalevit_jax import config as config_lib

{methods}
def get_config(method=None):
  config = config_lib.default()
  config.model.norm = method or "LN"
  return config
"""


@pytest.fixture
def measured(monkeypatch):
  """Record measured configs and return fake measurements of two blocks."""
  configs = []

  def measure(config, sharpness):
    configs.append(config)
    numbers = {"grad_norm": 4.0, "clip_factor": 0.25, "grad_share_qk": 0.125}
    numbers["embedding/jacobian"] = 12.0
    for depth, part in enumerate(("embedding", "block_00", "block_01")):
      numbers[f"{part}/stream_rms_cls"] = depth + 0.5
      numbers[f"{part}/stream_rms_patches"] = depth + 1.5
      if depth:
        numbers[f"{part}/grad_norm"] = 6.0 / depth
        numbers[f"{part}/attention_entropy"] = float(depth)
        if config.model.norm == "DyT":
          numbers[f"{part}/saturation_mlp"] = 0.3 * depth
    return numbers | ({"sharpness": -7.0} if sharpness else {})

  monkeypatch.setattr(probe, "measure", measure)
  monkeypatch.setattr(probe.terminal, "log_to_stderr", lambda: None)
  return configs


@pytest.fixture
def write_config(tmp_path):
  def write(methods=""):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(methods=methods))
    return path

  return write


def test_table_csv_and_plot(write_config, measured, tmp_path, capsys):
  config = write_config('METHODS = {"LN": 1, "DyT": 2}')
  out = tmp_path / "out"
  flags = [f"--config={config}", "--config.seed=3", f"--output={out}"]
  assert probe.main(flags) == 0
  assert [(c.model.norm, c.seed) for c in measured] == [("LN", 3), ("DyT", 3)]
  table = capsys.readouterr().out.splitlines()
  assert table[2] == (
    "| LN | LN | 0.5 → 2.5 | 1.5 → 3.5 | 4 | 0.25 | 2 | 12 | 0.125 | 1.5 | –"
    " | -7 |"
  )
  assert table[3].startswith("| DyT | DyT |") and "| 0.45 | -7 |" in table[3]
  assert table[4:] == [str(out / f"probe.{x}") for x in ("csv", "png", "svg")]
  with open(out / "probe.csv", encoding="utf-8", newline="") as f:
    rows = {(row["model"], row["part"]): row for row in csv.DictReader(f)}
  assert len(rows) == 8
  assert rows["LN", "all"]["grad_norm"] == "4.0"
  assert rows["LN", "all"]["seed"] == "3"
  assert rows["DyT", "block_01"]["saturation_mlp"] == "0.6"
  assert rows["LN", "block_01"]["saturation_mlp"] == ""
  assert (out / "probe.png").stat().st_size > 5000


@pytest.mark.parametrize(
  "methods, flags, norms",
  [
    ("", [], list(probe.norms.NORMS)),
    ('METHODS = ("GN", "BN")', [], ["GN", "BN"]),
    ('METHODS = ("GN", "BN")', ["--grid=model.norm=RMS,LN"], ["RMS", "LN"]),
  ],
)
def test_methods_of_a_config_are_measured(
  methods, flags, norms, write_config, measured, tmp_path
):
  flags = [f"--config={write_config(methods)}", "--no_sharpness", *flags]
  assert probe.main([*flags, f"--output={tmp_path}"]) == 0
  assert [config.model.norm for config in measured] == norms


def test_methods_of_two_configs_are_distinguished(measured, tmp_path, capsys):
  folder = paths.ROOT / "configs"
  flags = [
    f"--config={folder / name}.py:LN" for name in ("norm_free", "remove_norm")
  ]
  assert probe.main([*flags, f"--output={tmp_path}"]) == 0
  out = capsys.readouterr().out
  assert "| norm_free: LN | LN |" in out
  assert "| remove_norm: LN | LN |" in out
  copy = tmp_path / "norm_free.py"
  copy.write_text((folder / "norm_free.py").read_text())
  flags = [flags[0], f"--config={copy}:LN", f"--output={tmp_path}"]
  assert probe.main(flags) == 0
  assert f"| {copy}: LN | LN |" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_running_statistics_are_gathered(norm, tiny_config):
  """Without running statistics the norm acts as the identity."""
  tiny_config.model.update({"norm": norm, "residual": "plain"})
  tiny_config.model.num_layers = 2
  tiny_config.model.dropout_rate = 0.0
  tiny_config.augment.crop = False
  found = probe.measure(tiny_config, False)
  parts = experiment.create(tiny_config)
  state = parts.init_state()
  # Expected statistics are of the probe's images in training mode.
  model, x = parts.model, parts.dataset.test.images[:64]
  x = preprocess.prepare(x, tiny_config.image_size)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  _, seen = model.apply(
    variables,
    x,
    train=True,
    capture_intermediates=lambda module, _: isinstance(
      module, vit.EncoderBlock
    ),
    mutable=["intermediates", "batch_stats"],
  )
  seen = seen["intermediates"]["Transformer"]["encoderblock_1"]["__call__"][0]
  rms = float(np.sqrt(np.square(seen[:, 1:]).mean()))
  assert found["block_01/stream_rms_patches"] == pytest.approx(rms, rel=0.1)
  tiny_config.model.norm = "Identity"
  none = probe.measure(tiny_config, False)
  fresh = none["block_01/stream_rms_patches"]
  assert abs(found["block_01/stream_rms_patches"] / fresh - 1) > 0.05
  assert found["grad_norm"] != none["grad_norm"]


def test_statistics_missing_from_a_file_are_gathered(tiny_config, tmp_path):
  """Gathering does not advance the schedule of PRepBN."""
  tiny_config.total_steps = 20
  start = initial_state.create(experiment.create(tiny_config))
  npz.save(tmp_path / "a.npz", start.params, start.batch_stats)
  tiny_config.pretrained_path = str(tmp_path / "a.npz")
  tiny_config.model.norm = "PRepBN"
  fresh = experiment.create(tiny_config)
  state = probe.with_statistics(fresh, initial_state.create(fresh))
  stats = traverse_util.flatten_dict(state.batch_stats, sep="/")
  assert all(np.any(x) for k, x in stats.items() if k.endswith("/mean"))
  assert not any(np.any(x) for k, x in stats.items() if k.endswith("/faded"))
  assert probe.with_statistics(fresh, state) is state


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config={path}:GN", "--config={path}:GN"], "GN is given twice"),
    (["--config={path}", "--config.sed=1"], "did you mean seed"),
    (["--config={path}", "--grid=seed=0,0"], "has 0 twice"),
    (["--config=nowhere.py"], "nowhere.py"),
    (["--config={path}:PN"], "PN"),
  ],
)
def test_errors_are_one_line(
  flags, words, write_config, measured, tmp_path, capsys
):
  flags = [flag.format(path=write_config()) for flag in flags]
  assert probe.main([*flags, f"--output={tmp_path / 'out'}"]) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith("error: ") and words in error
  assert not measured and not (tmp_path / "out").exists()
