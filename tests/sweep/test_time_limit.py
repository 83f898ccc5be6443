"""The order of runs under a time limit."""

import json
import sys
import time

import fake_runs
import paths
import pytest

from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import execution
from rescalevit_jax.sweep import time_limit

MODELS = ("ViT-L_16", "ViT-B_16", "ViT-B_32")
NORMS = ("LN", "BN", "GN", "Rescale")


def plan(folder, *flags):
  """Plan RescaleViT's runs from scratch, the largest model first."""
  configs = [
    f"--config={paths.ROOT}/configs/original.py:{model},{norm}"
    for model in MODELS
    for norm in NORMS
  ]
  return command_line.parse([*configs, f"--runs_dir={folder}", *flags])[1]


def order(runs, minutes=1e9):
  """Return the names of runs in the order in which they are chosen."""
  limit = time_limit.TimeLimit(time.monotonic() + 60 * minutes)
  choose, waiting, names = time_limit.Chooser(runs, limit), list(runs), []
  while waiting and (run := choose(waiting)):
    waiting.remove(run)
    config = run.config
    names.append((config.model_name, config.model.norm, config.seed))
  return names


def save(run, step, seconds):
  """Write the progress of a run's checkpoint."""
  path = run.workdir / "checkpoints" / "last" / str(step) / "progress"
  path.mkdir(parents=True)
  progress = {"step": step, "seconds": seconds}
  (path / "metadata").write_text(json.dumps(progress))


def find(runs, model, norm):
  (run,) = [
    run
    for run in runs
    if (run.config.model_name, run.config.model.norm) == (model, norm)
  ]
  return run


def test_the_norms_of_a_cheap_model_are_first(tmp_path):
  expected = [(model, norm, 0) for model in MODELS[::-1] for norm in NORMS]
  runs = plan(tmp_path)
  assert order(runs) == expected
  # Before any measurement, all are started in this order, whatever the limit.
  assert order(runs, minutes=2) == expected
  assert order(runs, minutes=0.9) == []  # Too late to start and to save.


def test_a_second_seed_counts_half(tmp_path):
  names = order(plan(tmp_path, "--grid=seed=0,1,2"))
  # B_16 costs 4.1 times as much as B_32, per step of as many images.
  expected = [("ViT-B_32", norm, seed) for seed in (0, 1, 2) for norm in NORMS]
  assert names[:12] == expected
  assert names.index(("ViT-B_16", "LN", 2)) > names.index(("ViT-L_16", "GN", 0))


def test_measured_rates_replace_flops(tmp_path):
  runs = plan(tmp_path)
  # B_16 takes a third of B_32's time per step.
  fake_runs.write(
    find(runs, "ViT-B_16", "GN").workdir,
    result={"seconds": 200.0, "last_step": 20_000},
  )
  save(find(runs, "ViT-B_32", "LN"), 100, 3.0)
  started = find(runs, "ViT-L_16", "Rescale")
  save(started, 19_990, 20_000.0)
  waiting = [run for run in runs if run != find(runs, "ViT-B_16", "GN")]
  names = order(waiting)
  # The run of L_16 ends after ten steps.
  assert names[0] == ("ViT-L_16", "Rescale", 0)
  # B_16 takes 2.4 times as long as B_32 now, in proportion to its own run.
  assert [name[0] for name in names[1:]] == (
    ["ViT-B_32"] * 4 + ["ViT-B_16"] * 3 + ["ViT-L_16"] * 3
  )


def test_runs_that_end_in_time_are_first(tmp_path):
  runs = plan(tmp_path)
  save(find(runs, "ViT-B_32", "LN"), 100, 60.0)  # 20,000 steps take 200 min.
  started = find(runs, "ViT-L_16", "BN")
  save(started, 19_000, 19_000 * 60.0)  # 1,000 steps take 1,000 min.
  assert order(runs, minutes=100)[0] == ("ViT-B_32", "LN", 0)  # None ends.
  almost = find(runs, "ViT-B_16", "GN")
  save(almost, 19_900, 19_900 * 12.0)  # 100 steps take 20 min.
  assert order(runs, minutes=100)[0] == ("ViT-B_16", "GN", 0)
  assert order(runs, minutes=10)[0] == ("ViT-B_16", "GN", 0)
  assert order([r for r in runs if r != almost], minutes=300)[:4] == [
    ("ViT-B_32", norm, 0) for norm in NORMS
  ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 0, "seconds": 1}'])
def test_a_damaged_checkpoint_counts_as_unmeasured(text, tmp_path):
  (run,) = command_line.parse(
    [f"--config={paths.ROOT}/configs/quickstart.py", f"--runs_dir={tmp_path}"]
  )[1]
  save(run, 100, 1.0)
  assert time_limit.pace(run) == 0.01
  path = run.workdir / "checkpoints" / "last" / "100" / "progress" / "metadata"
  path.write_text(text)
  assert time_limit.pace(run) is None


def test_the_limit_stops_the_runs_and_leaves_the_rest(
  tmp_path, digits_dir, monkeypatch
):
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
  monkeypatch.setattr(
    type(runs[0]),
    "command",
    property(lambda self: [sys.executable, "-c", code, str(self.workdir)]),
  )
  outcome = command_line.execute(options, runs)
  assert outcome.left == runs and not outcome.done and not outcome.failed
  assert outcome.stopped and outcome.out_of_time and outcome.exit_code == 0
  assert (runs[0].workdir / "started").exists()
  assert not runs[1].workdir.exists()
