"""The speed benchmark: its measurements, its report and its errors."""

import importlib.util
import json
import os
import pathlib
import subprocess

import forked
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import input as input_benchmark
from rescalevit_jax.benchmark import peers
from rescalevit_jax.benchmark import run_worker
from rescalevit_jax.benchmark import worker
from rescalevit_jax.sweep import grid
from rescalevit_jax.training import experiment
from rescalevit_jax.training import train_step

KEYS = tiny_sweep.KEYS
# Random numbers take long to compile.
NOT_RANDOM = ("--set=model.dropout_rate=0.0", "--set=augment.crop=False")


def run(*args, env=None):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
  return forked.run(["rescalevit_jax.benchmark", *args], env)


@pytest.mark.parametrize(
  "full", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_all_programs_are_measured(digits_dir, shared_dir, tmp_path, full):
  """Most time goes to diagnostics, startup and compiling timm's model."""
  done = run(
    "--config=configs/quickstart.py",
    "--grid=model.norm=LN,Rescale",
    *(f"--set={key}" for key in (*KEYS, f"tfds_data_dir={digits_dir}")),
    *(["--set=diagnostics_every=5"] if full else ["--no_start", *NOT_RANDOM]),
    "--peer",
    "--same_malloc",
    "--rounds=1",
    "--seconds=0.5",
    "--eval_images=100",
    f"--output={tmp_path}",
    env={
      **tiny_sweep.environment(shared_dir),
      # Slow compilation: the cold start must be clearly slower.
      **(
        {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        if full
        else {"TORCH_COMPILE_DISABLE": "1"}
      ),
    },
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "benchmark.json").read_text())
  ours, flax = report["entries"][:2]
  subjects = [(e["subject"], e["norm"]) for e in report["entries"]]
  expected = [("ours", "LN"), ("flax", "LN"), ("ours", "Rescale")]
  if importlib.util.find_spec("timm") is None:
    assert "timm is not installed" in done.stderr
  else:
    expected.insert(2, ("timm", "LN"))
  assert subjects == expected
  # One block of width 16, MLP 32, patches of 4 x 4 in 8 x 8 pixels, 10 classes.
  tokens = 5
  forward = 2 * 4 * 48 * 16 + 2 * 16 * 10
  forward += tokens * (8 * 16 * 16 + 4 * 16 * 32) + 4 * tokens**2 * 16
  assert ours["training_flops_per_image"] == 3 * forward
  share = 3 * forward * ours["images_per_second"]
  share /= ours["rounds"][0]["peak_flops_per_second"]
  assert ours["peak_share"] == pytest.approx(share)
  assert ours["ratio_to_LN"] == 1 and ours["dtype"] == "float32"
  assert ours["ratio_to_flax"] == pytest.approx(
    ours["images_per_second"] / flax["images_per_second"]
  )
  assert ours["images_per_second"] == pytest.approx(48 / ours["step_seconds"])
  assert ours["memory_bytes"] > 0 and ours["eval_images_per_second"] > 0
  text = (tmp_path / "benchmark.md").read_text()
  assert str(tmp_path) not in text and str(digits_dir) not in text
  assert text in done.stdout
  assert "Peers use the same.\n" in text and "--same_malloc" in text
  assert "| ours, Rescale |" in text and "ETA" in done.stderr
  if not full:
    assert not report["starts"] and "measurement_steps" not in ours
    return
  measurement, sharpness = ours["measurement_steps"], ours["sharpness_steps"]
  assert sharpness > 0
  assert ours["diagnostics_share"] == pytest.approx(
    measurement / 5 + sharpness / 50
  )
  assert "measurement_steps" not in flax
  assert f"| {measurement:.2f} | {sharpness:.2f} | 5 |" in text
  (start,) = report["starts"]
  assert len(start["warm"]) == 2 and 0 < max(start["warm"]) < start["cold"]


@pytest.mark.parametrize("subject", ["ours", "flax"])
@pytest.mark.parametrize("same_malloc", [False, True])
def test_peers_get_the_malloc_settings_on_request(
  monkeypatch, subject, same_malloc
):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  found = {}

  def note(command, env, **kwargs):
    found.update(env)
    return subprocess.CompletedProcess(command, 0, "{}", "")

  monkeypatch.setattr(run_worker.subprocess, "run", note)
  (planned,) = grid.plan(
    ["configs/quickstart.py"], [], [], pathlib.Path("runs")
  )
  run_worker.measure(planned, subject, {}, same_malloc=same_malloc)
  expected = subject == "ours" or same_malloc
  assert ("glibc.malloc" in found.get("GLIBC_TUNABLES", "")) == expected


@pytest.mark.parametrize(
  "key, value", [("optimizer", "muon"), ("accum_steps", 2), ("sam_rho", 0.1)]
)
def test_recipes_that_peers_lack_are_refused(key, value):
  config = config_lib.default()
  peers.check_recipe(config)
  config[key] = value
  with pytest.raises(errors.UserError, match=f"peers train without {key}="):
    peers.check_recipe(config)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_timm_uses_our_dtype(dtype, tiny_config):
  torch = pytest.importorskip("torch")
  pytest.importorskip("timm")
  tiny_config.dtype = dtype
  peer = peers.TimmPeer(tiny_config)
  with peer._autocast():
    product = torch.ones(2, 2) @ torch.ones(2, 2)
  assert product.dtype == getattr(torch, dtype)


def test_resident_step_is_the_calibrated_step(tiny_config, monkeypatch):
  """The benchmark uses the step after Rescale's first batches."""
  settled = []
  loss_fn = train_step.loss_fn

  def record(*args, **kwargs):
    settled.append(kwargs["settled"])
    return loss_fn(*args, **kwargs)

  monkeypatch.setattr(train_step, "loss_fn", record)
  tiny_config.model.norm = "Rescale"
  found = experiment.create(tiny_config)
  worker._resident(found)(1)
  assert settled == [True]


def test_distinctive_settings_are_listed():
  a, b, c = (config_lib.default() for _ in range(3))
  b.model.norm, b.batch, b.model.residual = "Cal", 7, "rescalenet"
  c.model.norm = "BN"
  assert comparison.settings(a, [a, b, c]) == {"model.residual": "auto"}
  assert comparison.settings(b, [a, b, c]) == {"model.residual": "rescalenet"}
  assert comparison.settings(c, [a, c]) == {}


def test_the_model_of_a_peer_has_no_keys_of_another_norm():
  config = config_lib.default()
  config.model.norm, config.model.alpha_init = "DyT", "0.7"
  assert peers.model_of(config).config.norm == "LN"


@pytest.mark.parametrize("flag", ["--batch=0", "--records=10,0"])
def test_input_benchmark_refuses_zero(flag, capsys):
  with pytest.raises(SystemExit):
    input_benchmark.main([flag])
  assert "error: argument" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--grid=nrom=LN"], "nrom"),
    (["--rounds=0"], "--rounds"),
    (["--same_malloc"], "--same_malloc"),
    (["--devices=2"], "--compile_for"),
    (["--seconds=nan"], "--seconds"),
    (["--seconds=inf"], "--seconds"),
    (["--output=README.md"], "README.md"),
    (["--set=dataset=nothing", "--no_start"], "nothing"),
  ],
)
def test_errors_are_one_line(flags, words, tmp_path):
  done = run(
    "--config=configs/quickstart.py", f"--output={tmp_path / 'o'}", *flags
  )
  assert done.returncode == 1
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: ") and words in line
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.glob("o/*"))
