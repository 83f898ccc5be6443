"""Diagnostics do not change a run and are equal after a resume."""

import json
import math

import interruption
import jax
import numpy as np
import program_cache
import pytest

from rescalevit_jax import errors
from rescalevit_jax.analysis import probe
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import experiment
from rescalevit_jax.training import measurements
from rescalevit_jax.training import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory, module_config):
  """Return runs without diagnostics, with them, and with them and a kill."""
  folder = tmp_path_factory.mktemp("runs")
  config = module_config
  config.model.norm = "Derf"
  config.accum_steps = 2
  config.ema_decay = 0.9
  config.mixup = 0.8
  config.data.source = "streaming"
  config.grad_norm_clip = 0.23
  config.progress_every = 1
  config.total_steps = 9

  def missing():
    raise errors.UserError("TensorFlow would only take time")

  with program_cache.shared(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(metric_writers.tensorflow_cpu, "load", missing)
    train.train_and_evaluate(config, folder / "without")
    config.diagnostics_every = 3
    train.train_and_evaluate(config, folder / "with")
    with interruption.after_step(7):  # The last checkpoint is of step 4.
      train.train_and_evaluate(config, folder / "killed")
    train.train_and_evaluate(config, folder / "killed")
  return folder, config


def lines(workdir, diagnosed):
  """Return the lines of metrics.jsonl with or without diagnostics."""
  with open(workdir / "metrics.jsonl", encoding="utf-8") as f:
    found = [(json.loads(line), line) for line in f]
  return [
    (values, line)
    for values, line in found
    if (diagnostics.PREFIX in line) == diagnosed
  ]


def test_diagnostics_do_not_change_a_run(runs):
  folder, _ = runs
  assert lines(folder / "with", False) == lines(folder / "without", False)
  for which in ("latest", "best"):
    a, b = (
      checkpoint.load_variables(folder / name, which)
      for name in ("with", "without")
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y)


def test_a_resumed_run_writes_equal_diagnostics(runs):
  folder, _ = runs
  a, b = (folder / name / "metrics.jsonl" for name in ("with", "killed"))
  assert a.read_bytes() == b.read_bytes()


def test_diagnostics_have_the_documented_names(runs):
  folder, _ = runs
  found = {x["step"]: x for x, _ in lines(folder / "with", True)}
  assert list(found) == [1, 3, 6, 9]
  stream = {f"stream_{x}" for x in ("rms_cls", "mean_cls")}
  stream |= {f"stream_{x}" for x in ("rms_patches", "mean_patches")}
  of_all = {"grad_norm", "update_ratio"}
  of_block = {"grad_norm_qk", "attention_entropy"}
  of_block |= {"saturation_attention", "saturation_mlp"}
  scalars = {"alpha", "shift", "scale"}
  of_block |= {f"{x}_{site}" for x in scalars for site in ("attention", "mlp")}
  want = {"clipped_share", "effective_lr"}
  want |= {f"embedding/{name}" for name in stream | of_all}
  want |= {f"head/{name}" for name in of_all | scalars | {"saturation"}}
  want |= {f"block_00/{name}" for name in stream | of_all | of_block}
  want = {"step"} | {f"diagnostics/{name}" for name in want}
  sharpness = {"diagnostics/sharpness", "diagnostics/sharpness_residual"}
  assert found[9].keys() == want
  assert found[1].keys() == want | sharpness


def test_measured_gradient_norm_equals_the_training_steps(runs):
  folder, _ = runs
  norms = {
    x["step"]: x["train/grad_norm"]
    for x, _ in lines(folder / "with", False)
    if "train/loss" in x
  }
  for line, _ in lines(folder / "with", True):
    parts = [x for key, x in line.items() if key.endswith("/grad_norm")]
    assert len(parts) == 3
    assert math.hypot(*parts) == pytest.approx(norms[line["step"]], rel=1e-4)


def test_clipped_share_covers_steps_since_the_previous_line(runs):
  folder, config = runs
  trained = [x for x, _ in lines(folder / "with", False) if "train/loss" in x]
  shares = set()
  first = 0
  for line, _ in lines(folder / "with", True):
    steps = trained[first : line["step"]]
    first = line["step"]
    norms = np.array([x["train/grad_norm"] for x in steps])
    rates = np.array([x["train/lr"] for x in steps])
    share = (norms > config.grad_norm_clip).mean()
    rate = (rates * np.minimum(1, config.grad_norm_clip / norms)).mean()
    shares.add(share)
    assert line["diagnostics/clipped_share"] == share
    assert line["diagnostics/effective_lr"] == pytest.approx(rate, rel=1e-6)
  assert len(shares) > 1


def test_update_ratio_at_step_1_by_hand(runs):
  folder, config = runs
  (line, _), *_ = lines(folder / "with", True)
  params = experiment.create(config).init_state().params
  weights = np.sqrt(measurements.sums_of_squares(params))
  rate = line["diagnostics/effective_lr"]
  for part, weight in zip(measurements.parts(1), weights, strict=True):
    of_part = f"diagnostics/{part}/"
    update = rate * line[f"{of_part}grad_norm"]  # Momentum is 0.
    ratio = line[f"{of_part}update_ratio"]
    assert ratio == pytest.approx(update / weight, rel=1e-4)


def test_probe_equals_diagnostics_of_step_1(runs):
  folder, config = runs
  (line, _), *_ = lines(folder / "with", True)
  found = probe.measure(config)
  of_all = [found.pop(f"{x}") for x in ("grad_norm", "grad_share_qk")]
  assert found.pop("clip_factor") == min(1, config.grad_norm_clip / of_all[0])
  want = {
    name.removeprefix(diagnostics.PREFIX): value
    for name, value in line.items()
    if "update_ratio" not in name
  }
  del want["step"], want["clipped_share"], want["effective_lr"]
  jacobian = [found.pop(f"{x}/jacobian") for x in ("embedding", "block_00")]
  assert jacobian[0] > 0 and jacobian[1] == 1
  assert found == pytest.approx(want, rel=1e-5, abs=1e-7)
  share = want["block_00/grad_norm_qk"] ** 2 / of_all[0] ** 2
  assert of_all[1] == pytest.approx(share)


@pytest.mark.parametrize(
  "norm, clip, factor",
  [
    (2.0, 1.0, 0.5),
    (0.5, 1.0, 1),
    (2.0, 0.0, 1),
    (math.nan, 1.0, 0),  # A skipped step in float16.
    (math.inf, 0.0, 0),
  ],
)
def test_clip_factor_by_hand(norm, clip, factor):
  assert diagnostics.clip_factor(norm, clip) == factor
