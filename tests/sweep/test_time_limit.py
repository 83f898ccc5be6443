"""The order of runs under a time limit."""

import json
import shutil
import time

import fake_runs
import paths
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax.runs import folder
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import execution
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import outcome as outcome_lib
from rescalevit_jax.sweep import time_limit

MODELS = ("ViT-L_16", "ViT-B_16", "ViT-B_32")
NORMS = ("LN", "BN", "GN", "Rescale")


def plan(folder, *flags, norms=NORMS):
  """Plan RescaleViT's runs from scratch, the largest model first."""
  configs = [
    f"--config={paths.ROOT}/configs/original.py:{model},{norm}"
    for model in MODELS
    for norm in norms
  ]
  return command_line.parse([*configs, f"--runs_dir={folder}", *flags])[1]


def order(runs, minutes=1e9):
  """Return the names of unfinished runs in the order in which they start."""
  limit = time_limit.TimeLimit(time.monotonic() + 60 * minutes)
  choose, names = time_limit.Chooser(runs, limit), []
  _, waiting = outcome_lib.split_by_result(runs)
  while waiting and (run := choose(waiting)):
    waiting.remove(run)
    config = run.config
    names.append((config.model_name, config.model.norm, config.seed))
  return names


def finish(run, seconds, examples_evaluated=0):
  """Write the result of a run that took `seconds` to train."""
  speed = run.config.total_steps * run.config.batch / seconds
  result = {"images_per_second": speed}
  result |= {"examples_evaluated": examples_evaluated}
  fake_runs.write(run.workdir, config_lib.flatten(run.config), result)


def save(run, step, seconds):
  """Write the config and the progress of a run's checkpoint."""
  if not run.workdir.exists():
    fake_runs.write(run.workdir, config_lib.flatten(run.config))
  path = run.workdir / "checkpoints" / "last" / str(step) / "progress"
  path.mkdir(parents=True)
  progress = {"timed_steps": step, "timed_seconds": seconds}
  progress["examples_evaluated"] = 0
  (path / "metadata").write_text(json.dumps(progress))


def find(runs, model, norm):
  (run,) = [
    run
    for run in runs
    if (run.config.model_name, run.config.model.norm) == (model, norm)
  ]
  return run


def test_norms_of_a_cheap_model_come_first(tmp_path):
  expected = [(model, norm, 0) for model in MODELS[::-1] for norm in NORMS]
  runs = plan(tmp_path)
  assert order(runs) == expected
  # Without measurements, runs start in this order for any limit.
  assert order(runs, minutes=2) == expected
  assert order(runs, minutes=0.9) == []  # Too late to start and save.


def test_a_second_seed_has_half_the_priority(tmp_path):
  names = order(plan(tmp_path, "--grid=seed=0,1,2"))
  # A step of B_16 costs 4.1 times as much as one of B_32.
  expected = [("ViT-B_32", norm, seed) for seed in (0, 1, 2) for norm in NORMS]
  assert names[:12] == expected
  assert names.index(("ViT-B_16", "LN", 2)) > names.index(("ViT-L_16", "GN", 0))


def test_measured_rates_replace_flops(tmp_path):
  runs = plan(tmp_path)
  finish(find(runs, "ViT-B_16", "GN"), 200.0)
  finish(find(runs, "ViT-B_32", "BN"), 600.0)
  names = order(runs)
  # A step of L_16 has 1.8 times the FLOPs of B_16, so the run takes 350 s.
  expected = [("ViT-B_16", norm, 0) for norm in ("LN", "BN", "Rescale")]
  expected += [("ViT-L_16", norm, 0) for norm in NORMS]
  expected += [("ViT-B_32", norm, 0) for norm in ("LN", "GN", "Rescale")]
  assert names == expected


def test_a_started_run_uses_its_own_rate_and_remaining_steps(tmp_path):
  runs = plan(tmp_path)
  finish(find(runs, "ViT-B_32", "LN"), 600.0)
  save(find(runs, "ViT-B_32", "Rescale"), 100, 2.0)  # 398 s are left.
  save(find(runs, "ViT-B_32", "BN"), 100, 4.0)  # 796 s are left.
  save(find(runs, "ViT-L_16", "Rescale"), 19_990, 20_000.0)  # 10 s are left.
  assert order(runs)[:4] == [
    ("ViT-L_16", "Rescale", 0),
    ("ViT-B_32", "Rescale", 0),
    ("ViT-B_32", "GN", 0),
    ("ViT-B_32", "BN", 0),
  ]


@pytest.mark.parametrize(
  "minutes, first", [(200, "ViT-B_16"), (80, "ViT-B_32"), (61, "ViT-B_16")]
)
def test_runs_that_finish_in_time_come_first(minutes, first, tmp_path):
  runs = plan(tmp_path, "--grid=seed=0,1", norms=["LN"])
  finished = {("ViT-B_32", 0): 60, ("ViT-B_16", 1): 100}
  for run in runs:
    if took := finished.get((run.config.model_name, run.config.seed)):
      finish(run, 60.0 * took)
  # The second seed of B_32 is ordered as if it took 120 minutes.
  assert order(runs, minutes)[0][0] == first


def test_evaluations_are_weighted_by_flops(tmp_path):
  run = find(plan(tmp_path), "ViT-B_32", "LN")
  # 100 images per step, a third of the FLOPs of 128 training images.
  finish(run, 600.0, examples_evaluated=10_000)
  assert time_limit.pace(run) == pytest.approx(0.03 * (1 + 100 / (3 * 128)))


@pytest.mark.parametrize(
  "text",
  [
    *("", "{", "[]", '{"timed_steps": 100}'),
    '{"timed_steps": 49, "timed_seconds": 1.0, "examples_evaluated": 0}',
  ],
)
def test_a_damaged_or_early_checkpoint_counts_as_unmeasured(text, tmp_path):
  (run,) = command_line.parse(
    [f"--config={paths.ROOT}/configs/quickstart.py", f"--runs_dir={tmp_path}"]
  )[1]
  save(run, 100, 1.0)
  assert time_limit.pace(run) == 0.01
  path = run.workdir / "checkpoints" / "last" / "100" / "progress" / "metadata"
  path.write_text(text)
  assert time_limit.pace(run) is None


def test_rate_is_read_from_a_saved_checkpoint(
  default_run, tmp_path, monkeypatch
):
  """Detects changes of orbax's file format."""
  monkeypatch.setattr(time_limit, "_MIN_TIMED_STEPS", 1)
  shutil.copytree(default_run / "checkpoints", tmp_path / "checkpoints")
  config = folder.require_config(default_run)
  run = grid.PlannedRun(tmp_path, "", (), config)
  assert time_limit.pace(run) > 0


def test_time_limit_stops_runs(tmp_path, digits_dir, monkeypatch):
  options, runs = command_line.parse(
    [
      f"--config={paths.ROOT}/configs/quickstart.py",
      f"--config.tfds_data_dir={digits_dir}",
      f"--runs_dir={tmp_path}",
      "--grid=seed=0,1",
      "--minutes=0.01",
    ]
  )
  monkeypatch.setattr(time_limit, "SECONDS_TO_START", 0.0)
  monkeypatch.setattr(time_limit, "_SECONDS_TO_SAVE", 0.0)
  monkeypatch.setattr(
    execution.device_slots, "find", lambda jobs: [{} for _ in range(jobs or 1)]
  )
  code = (
    "import pathlib, signal, sys, time;"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
    "pathlib.Path(sys.argv[1], 'started').touch(); time.sleep(60)"
  )
  tiny_sweep.replace_command(monkeypatch, code)
  outcome = command_line.execute(options, runs)
  assert outcome.left == runs and not outcome.done and not outcome.failed
  assert outcome.stopped and outcome.out_of_time and outcome.exit_code == 0
  assert (runs[0].workdir / "started").exists()
  assert not runs[1].workdir.exists()
