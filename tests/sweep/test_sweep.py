"""Sweeps with real processes and real signals."""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import fake_runs
import paths
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import lock
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import device_slots
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import local_scheduler
from rescalevit_jax.sweep import outcome as outcome_lib

RESULT = json.dumps(fake_runs.RESULT)

CONFIG = f"--config={paths.ROOT}/configs/quickstart.py"
# Norms with one training program; Rescale has two.
GRID = ("--grid=model.norm=BN,LN", "--grid=seed=0,1")
NAMES = [
  f"digits-ViT-XS_2-{norm}-scratch-seed{seed}"
  for norm in ("BN", "LN")
  for seed in (0, 1)
]


@pytest.fixture(scope="module")
def tiny(digits_dir, shared_dir):
  """Return the keyword arguments of tiny_sweep.run."""
  keys = (*tiny_sweep.KEYS, f"tfds_data_dir={digits_dir}")
  return {"keys": keys, "env": tiny_sweep.environment(shared_dir)}


@pytest.fixture(scope="module")
def finished(tiny, shared_dir):
  """Return the folder of a finished sweep of GRID, run two at a time."""
  runs_dir = shared_dir / "finished_sweep"
  with open(shared_dir / "finished_sweep.lock", "w") as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # Test workers share it.
    if not (runs_dir / "stderr").exists():
      done = tiny_sweep.run(runs_dir, *GRID, "--jobs=2", **tiny)
      assert done.returncode == 0, done.stderr
      runs_dir.joinpath("stderr").write_text(done.stderr)
  return runs_dir


def snapshot(folder):
  return {
    str(p): p.read_bytes() if p.is_file() else None
    for p in pathlib.Path(folder).rglob("*")
  }


def assert_one_line_error(stderr, *words):
  assert "Traceback" not in stderr
  line = stderr.splitlines()[-1]
  assert line.startswith("error: ") and stderr.count("error: ") == 1, stderr
  for word in words:
    assert word in line, line


def assert_same_runs(a, b):
  """Check that two sweeps have equal results and metrics."""
  assert sorted(p.name for p in a.glob("digits*")) == NAMES
  for name in NAMES:
    results = [
      json.loads((x / name / "result.json").read_text()) for x in (a, b)
    ]
    for key in ("last_accuracy", "best_accuracy", "best_step", "last_loss"):
      assert results[0][key] == results[1][key]
    metrics = [(x / name / "metrics.jsonl").read_bytes() for x in (a, b)]
    assert metrics[0] == metrics[1]
    assert metrics[0].count(b"\n") == 24  # 20 for training, 4 for evaluation.


def test_progress_counts_finished_and_remaining_runs(finished):
  stderr = (finished / "stderr").read_text()
  assert "4 runs in" in stderr and "0 finished" in stderr
  assert "0 of 4 done, 0 failed, 2 running, 2 left" in stderr  # At startup.
  assert re.search(r"[23] of 4 done, .* left, ETA \d+ ", stderr)
  assert re.search(rf"  {NAMES[0]}: ", stderr)
  assert stderr.splitlines()[-1].endswith(" 4 done, 0 failed")
  for name in NAMES:
    assert sorted(p.name for p in (finished / name).iterdir()) == [
      "checkpoints",
      "class_names.json",
      "config.json",
      "confusion.csv",
      "confusion.png",
      "eval.json",
      "log.txt",
      "metrics.jsonl",
      "result.json",
    ]
    log = (finished / name / "log.txt").read_text()
    assert log.startswith("--- 20") and "rescalevit_jax.main" in log
    assert log.splitlines()[-1][9:].startswith("finished: test accuracy ")
  one, two = [
    json.loads((finished / name / "result.json").read_text())["last_loss"]
    for name in NAMES[:2]
  ]
  assert one != two


def test_finished_runs_are_skipped(finished, tiny):
  before = snapshot(finished)
  done = tiny_sweep.run(finished, *GRID, **tiny)
  assert done.returncode == 0
  assert "4 runs in" in done.stderr and "4 finished" in done.stderr
  assert "starting" not in done.stderr
  assert snapshot(finished) == before


def test_a_sweep_killed_twice_resumes(finished, tiny, tmp_path):
  """SIGKILL leaves no process behind, and the results are equal."""
  runs_dir = tmp_path / "runs"
  for name in (NAMES[0], NAMES[2]):
    process = tiny_sweep.start(runs_dir, *GRID, "--jobs=2", **tiny)
    tiny_sweep.wait_for(
      lambda name=name: tiny_sweep.is_under_way(runs_dir / name), process
    )
    process.kill()
    process.communicate()
    tiny_sweep.wait_for(lambda: not tiny_sweep.processes_of(runs_dir))
    assert len(list(runs_dir.glob("*/result.json"))) < 4
  done = tiny_sweep.run(runs_dir, *GRID, "--jobs=2", **tiny)
  assert done.returncode == 0, done.stderr
  assert_same_runs(runs_dir, finished)
  log = (runs_dir / NAMES[0] / "log.txt").read_text()
  assert "\n---" in log  # Another start.


def test_a_signal_saves_and_stops(finished, tiny, tmp_path):
  runs_dir = tmp_path / "runs"
  shutil.copytree(finished / NAMES[0], runs_dir / NAMES[0])
  shutil.copytree(finished / NAMES[3], runs_dir / NAMES[3])
  process = tiny_sweep.start(runs_dir, *GRID, **tiny)
  tiny_sweep.wait_for(
    lambda: tiny_sweep.is_under_way(runs_dir / NAMES[1]), process
  )
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 0, stderr
  assert "SIGINT: the runs save and stop" in stderr
  assert "the same command resumes" in stderr.splitlines()[-1]
  assert not tiny_sweep.processes_of(runs_dir)
  assert not (runs_dir / NAMES[2]).exists()  # Not started.
  log = (runs_dir / NAMES[1] / "log.txt").read_text()
  assert "SIGTERM: saving a checkpoint" in log
  done = tiny_sweep.run(runs_dir, *GRID, **tiny)
  assert done.returncode == 0, done.stderr
  assert_same_runs(runs_dir, finished)
  log = (runs_dir / NAMES[1] / "log.txt").read_text()
  assert "resuming from step" in log or "already finished" in log


@pytest.mark.slow
def test_a_second_signal_kills_and_nohup_is_respected(tiny, tmp_path):
  runs_dir = tmp_path / "runs"
  keys = (*tiny["keys"], "total_steps=100000", "checkpoint_every=100000")
  keys = (*keys, "model.norm=LN")
  keys = [k for k in keys if k not in ("total_steps=40", "checkpoint_every=8")]
  previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup sets this.
  process = tiny_sweep.start(runs_dir, keys=keys, env=tiny["env"])
  signal.signal(signal.SIGHUP, previous)
  workdir = runs_dir / NAMES[2]
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(workdir), process)
  (run,) = tiny_sweep.processes_of(workdir)
  os.kill(run, signal.SIGSTOP)  # Makes a run hang.
  process.send_signal(signal.SIGHUP)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1.5)
  process.send_signal(signal.SIGTERM)
  for line in process.stderr:
    assert "SIGHUP" not in line
    if "a second signal" in line:
      break
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=20)
  assert process.returncode == 130
  assert "1 left" in stderr
  assert not tiny_sweep.processes_of(runs_dir)


def test_a_failing_run_is_reported_and_does_not_stop_others(tiny, tmp_path):
  flags = ("--grid", "base_lr=1e30,0.1", "--config.seed", "5")
  done = tiny_sweep.run(tmp_path, *flags, "--config.model.norm=LN", **tiny)
  assert done.returncode == 1
  start = f"{tmp_path}/digits-ViT-XS_2-LN-scratch-seed5-base_lr="
  summary = done.stderr.splitlines()[-3:]
  assert summary[0].endswith("1 done, 1 failed")
  assert f"failed: {start}1e+30: error: step " in summary[1]
  assert "training diverged" in summary[1]
  assert "the same command" in summary[2]
  assert (tmp_path / f"{start}0.1" / "result.json").exists()
  assert "Traceback" not in done.stderr


def test_a_run_locked_by_another_process_is_not_started(
  finished, tiny, tmp_path
):
  for name in NAMES[:3]:
    shutil.copytree(finished / name, tmp_path / name)
  with lock.hold(tmp_path / NAMES[3]):
    done = tiny_sweep.run(tmp_path, *GRID, **tiny)
  assert done.returncode == 1
  assert "error: " in done.stderr.splitlines()[-2]
  assert "another process works on this run" in done.stderr.splitlines()[-2]


def test_dry_run_prints_commands_and_writes_nothing(finished, tiny, tmp_path):
  runs_dir = tmp_path / "a folder"
  shutil.copytree(finished / NAMES[1], runs_dir / NAMES[1])
  before = snapshot(tmp_path)
  done = tiny_sweep.run(runs_dir, *GRID, "--dry_run", **tiny)
  assert done.returncode == 0
  assert snapshot(tmp_path) == before
  commands = done.stdout.splitlines()
  assert len(commands) == 4
  assert f"already finished: {runs_dir / NAMES[1]}" in done.stderr
  assert done.stderr.count("\n") == 1
  for command, name in zip(commands, NAMES, strict=True):
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", "rescalevit_jax.main"]
    assert f"--workdir={runs_dir / name}" in words


@pytest.mark.parametrize(
  "args, code, words",
  [
    (["--grid=model.nrom=LN"], 2, ["model.nrom", "model.norm"]),
    (["--gird=seed=1"], 2, ["--gird", "--grid"]),
    (["--jobs=0"], 2, ["--jobs: 0"]),
    (["--jobs=two"], 2, ["--jobs", "two"]),
    (["--minutes=0"], 2, ["--minutes: 0"]),
    (["--minutes=nan"], 2, ["--minutes: nan"]),
    (["--minutes=9", "--cluster=slurm"], 2, ["--minutes", "timeout_min"]),
    (["--slurm_args=a=1"], 2, ["--cluster"]),
    (["--cluster=pbs"], 2, ["pbs", "slurm"]),
    (["stray"], 2, ["stray"]),
    (["--config.seed"], 2, ["seed", "KEY=VALUE"]),
    (["--grid=image_size=8,9"], 2, ["image_size", "patch", "image_size=9"]),
    (["--config.model.num_heads=5"], 2, ["heads"]),
    (["--config.dataset=cifar11"], 1, ["cifar11", "cifar10"]),
    (["--config.pretrained_path=a.npz"], 1, ["a.npz", "pretrained_path"]),
  ],
)
def test_invalid_arguments_are_reported_in_one_line(
  args, code, words, tmp_path, capsys
):
  runs_dir = tmp_path / "runs"
  flags = [CONFIG, f"--runs_dir={runs_dir}", *args]
  assert command_line.main(flags) == code
  assert_one_line_error(capsys.readouterr().err, *words)
  assert not runs_dir.exists()


def test_a_missing_config_is_an_error(capsys):
  assert command_line.main(["--grid=seed=0"]) == 2
  assert_one_line_error(capsys.readouterr().err, "--config")


def test_help_shows_flags_and_an_example(capsys):
  with pytest.raises(SystemExit) as e:
    command_line.main(["--help"])
  assert not e.value.code
  out = capsys.readouterr().out
  for word in ("--grid model.norm=LN,BN,GN,Rescale", "--dry_run", "--cluster"):
    assert word in out


def test_all_missing_weights_are_reported_before_any_run_starts(
  tmp_path, capsys, digits_dir
):
  (tmp_path / "there.npz").write_text("")
  paths = ",".join(f"{tmp_path}/{x}.npz" for x in ("a", "there", "b"))
  flags = [CONFIG, f"--runs_dir={tmp_path / 'runs'}"]
  flags += [f"--grid=pretrained_path=None,{paths}", "--grid=seed=0,1"]
  assert command_line.main(flags) == 1
  err = capsys.readouterr().err
  assert_one_line_error(err, f"{tmp_path}/a.npz, {tmp_path}/b.npz;")
  assert "there.npz" not in err
  assert not (tmp_path / "runs").exists()


def test_a_folder_with_another_run_is_an_error(finished, tiny, capsys):
  before = snapshot(finished)
  flags = [CONFIG, f"--runs_dir={finished}", *GRID]
  keys = [k.replace("warmup_steps=3", "warmup_steps=4") for k in tiny["keys"]]
  flags += [f"--config.{k}" for k in keys]
  assert command_line.main(flags) == 1
  err = capsys.readouterr().err
  assert_one_line_error(err, NAMES[0], "warmup_steps", "--runs_dir")
  assert "--workdir" not in err
  assert snapshot(finished) == before


def test_advice_for_a_finished_run_is_a_valid_command(finished, tiny, capsys):
  flags = [CONFIG, f"--runs_dir={finished}", *GRID]
  keys = [k for k in tiny["keys"] if not k.startswith("total_steps")]
  flags += [f"--config.{k}" for k in [*keys, "total_steps=100"]]
  assert command_line.main(flags) == 1
  err = capsys.readouterr().err
  assert f"export --workdir={finished}" in err and "another --runs_dir" in err


@pytest.mark.parametrize("file", ["result.json", "config.json"])
def test_a_damaged_run_does_not_stop_other_runs(file, tmp_path):
  def run(name):
    return grid.PlannedRun(tmp_path / name, "", (), config_lib.default())

  (tmp_path / "a").mkdir()
  (tmp_path / "a" / file).write_text("{")
  found, left = outcome_lib.split_by_result([run("a"), run("b")])
  ((failed, reason),) = found.failed
  assert failed.workdir.name == "a" and f"{file}: damaged" in reason
  assert [x.workdir.name for x in left] == ["b"]


def test_planning_does_not_initialize_devices(tmp_path, tiny):
  """Initializing a GPU would occupy the memory that runs need."""
  code = (
    "import sys; from rescalevit_jax.sweep import command_line, outcome;"
    "_, runs = command_line.parse(sys.argv[1:]);"
    "outcome.split_by_result(runs);"
    "from jax._src import xla_bridge;"
    "print(len(runs), xla_bridge.backends_are_initialized())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, CONFIG, *GRID],
    cwd=paths.ROOT,
    env=tiny["env"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ["4", "False"], done.stderr


@pytest.mark.parametrize(
  "count, jobs, visible, expected",
  [
    (4, None, None, ["0", "1", "2", "3"]),
    (4, 2, None, ["0,1", "2,3"]),
    (4, 1, None, ["0,1,2,3"]),
    (8, 3, None, ["0,1", "2,3", "4,5"]),
    (2, 2, "5,7", ["5", "7"]),
    (2, 1, "GPU-a,GPU-b", ["GPU-a,GPU-b"]),
  ],
)
def test_gpus_are_split_among_jobs(count, jobs, visible, expected):
  environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
  slots = device_slots.split("gpu", count, jobs, environment)
  assert [s["CUDA_VISIBLE_DEVICES"] for s in slots] == expected


def test_cpus_and_tpus_are_split_among_jobs():
  assert device_slots.split("cpu", 1, None, {}) == [{}]
  assert device_slots.split("cpu", 1, 3, {}) == [{}, {}, {}]
  assert device_slots.split("tpu", 4, None, {}) == [{}]
  with pytest.raises(errors.UserError, match=r"the number of GPUs \(2\)"):
    device_slots.split("gpu", 2, 3, {})
  with pytest.raises(errors.UserError, match="cannot share a TPU"):
    device_slots.split("tpu", 4, 2, {})


def test_runs_use_the_gpus_of_their_slot(tmp_path, monkeypatch):
  """A process gets the variables of its slot; a slot has one run at a time."""
  _, runs = command_line.parse(
    [CONFIG, f"--runs_dir={tmp_path}"] + ["--grid=seed=0,1,2,3"]
  )
  code = (
    "import os, pathlib, sys, time; f = pathlib.Path(sys.argv[1]);"
    "gpu = f.parent / os.environ['CUDA_VISIBLE_DEVICES'];"
    "gpu.mkdir(); time.sleep(0.3); gpu.rmdir();"
    "(f / 'result.json').write_text(sys.argv[2])"
  )
  tiny_sweep.replace_command(monkeypatch, code, RESULT)
  slots = [{"CUDA_VISIBLE_DEVICES": x} for x in ("5", "7")]
  outcome = local_scheduler.LocalScheduler(runs, [], slots).run()
  assert not outcome.failed and len(outcome.done) == 4


def test_a_signal_is_recorded_even_if_all_runs_finish(tmp_path, monkeypatch):
  """The signal arrives just before the last run finishes."""
  _, runs = command_line.parse([CONFIG, f"--runs_dir={tmp_path}"])
  code = (
    "import os, pathlib, signal, sys, time;"
    "signal.signal(signal.SIGTERM, lambda *_: None);"
    "os.kill(int(sys.argv[2]), signal.SIGTERM); time.sleep(0.6);"
    "(pathlib.Path(sys.argv[1]) / 'result.json').write_text(sys.argv[3])"
  )
  tiny_sweep.replace_command(monkeypatch, code, str(os.getpid()), RESULT)
  outcome = local_scheduler.LocalScheduler(runs, [], [{}]).run()
  assert outcome.done == runs and not outcome.left
  assert outcome.stopped and not outcome.killed and outcome.exit_code == 0


def test_eta_is_remaining_flops_divided_by_speed(tmp_path, monkeypatch):
  _, runs = command_line.parse(
    [CONFIG, f"--runs_dir={tmp_path}"]
    + ["--grid=batch=64,128", "--config.total_steps=100"]
    + ["--config.warmup_steps=0"]
  )
  assert runs[1].step_flops == 2 * runs[0].step_flops
  now = [0.0]
  monkeypatch.setattr(local_scheduler.time, "monotonic", lambda: now[0])
  plan = local_scheduler.LocalScheduler(runs, [], [{}])
  assert plan._eta() is None
  workdir = runs[0].workdir
  (workdir / "checkpoints" / "last" / "20").mkdir(parents=True)
  running = local_scheduler._Running(plan._waiting.pop(0), None, {}, 0.0, 20)
  plan._running.append(running)
  assert plan._eta() is None
  lines = [json.dumps({"step": step}) for step in (20, 40)]
  (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"ste')
  now[0] = 10.0
  # 20 steps took 10 s; 60 are left, and 100 with twice the FLOPs.
  assert plan._eta() == pytest.approx(130.0)
  running.started = 4e9  # The file is from a previous start.
  assert plan._eta() is None


@pytest.mark.parametrize(
  "dataset", ["cifar10", pytest.param("cifar100", marks=pytest.mark.slow)]
)
def test_the_study_scripts_plan_the_original_runs(dataset, tmp_path):
  """The scripts run in a root folder with a prepared environment."""
  for name in ("configs", "rescalevit_jax"):
    (tmp_path / name).symlink_to(paths.ROOT / name)
  (tmp_path / "scripts").mkdir()
  (tmp_path / "scripts" / "env.sh").write_text("")
  for path in (paths.ROOT / "scripts").glob("*.sh"):
    if path.name != "env.sh":
      shutil.copy(path, tmp_path / "scripts")
  python = tmp_path / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()

  def study(*args, **env):
    return subprocess.run(
      ["bash", str(tmp_path / "scripts" / f"train_{dataset}.sh"), *args],
      cwd=elsewhere,
      env={**os.environ, **env},
      capture_output=True,
      text=True,
      check=False,
    )

  odd = tmp_path / "a:b"
  shutil.copytree(tmp_path / "scripts", odd / "scripts")
  done = subprocess.run(
    ["bash", odd / "scripts" / f"train_{dataset}.sh", "--dry_run"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert_one_line_error(done.stderr, str(odd), "':'")

  done = study("--dry_run")
  assert done.returncode == 0, done.stderr
  commands = [shlex.split(line) for line in done.stdout.splitlines()]
  found = []
  for command in commands:
    assert f"--config.dataset={dataset}" in command
    _, (run,) = command_line.parse(
      [x for x in command[3:] if not x.startswith("--workdir")]
      + [f"--runs_dir=runs/{dataset}"]
    )
    config = run.config
    assert f"--workdir={run.workdir}" in command
    found.append((config.model_name, config.model.norm, config.pretrained_path))
    assert config.dataset == dataset
    assert config.batch == (64 if config.model_name == "ViT-L_16" else 128)
    assert (config.total_steps, config.warmup_steps) == (20_000, 500)
    assert (config.base_lr, config.decay_type) == (0.05, "cosine")
    assert (config.image_size, config.seed) == (224, 0)
  expected = []
  for model in ("ViT-B_16", "ViT-B_32", "ViT-L_32", "ViT-L_16"):
    expected.append((model, "LN", f"weights/{model}.npz"))
    expected += [(model, norm, None) for norm in ("LN", "BN", "GN", "Rescale")]
  assert found == expected
  assert done.stderr.count("missing: weights/") == 4

  done = study("--dry_run", "--models=ViT-B_32", WEIGHTS="")
  assert done.stdout.count("\n") == 4 and "pretrained" not in done.stdout

  # Relative to the current directory.
  done = study("--grid=seed=0,1", WEIGHTS="my weights")
  assert done.returncode == 1
  assert_one_line_error(
    done.stderr, "my weights/ViT-B_16.npz", "my weights/ViT-L_32.npz"
  )
  assert not any(elsewhere.iterdir())
