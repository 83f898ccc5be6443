"""Runs with several processes."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import many_processes
import networks
import numpy as np
import paths
import pytest
import tiny_sweep

from rescalevit_jax import errors
from rescalevit_jax.distributed import processes as processes_lib
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import run_reader

DEVICES = 4  # Total over all processes.


@pytest.fixture(scope="module")
def setting(digits_dir, shared_dir):
  """Return the environment and config keys of the runs."""
  keys = [
    *tiny_sweep.KEYS,
    f"tfds_data_dir={digits_dir}",
    "model.norm=BN",
    "accum_steps=2",
    "batch=96",
    "progress_every=1",
  ]
  return tiny_sweep.environment(shared_dir), keys


@pytest.fixture(scope="module")
def alone(setting, shared_dir):
  """Return a run of one process, in a one-task step of a larger Slurm job."""
  workdir = shared_dir / "alone"
  env, keys = setting
  env = {**env, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}
  with open(shared_dir / "alone.lock", "w") as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # Test workers share it.
    if not (workdir / "result.json").exists():
      run(workdir, (env, keys), 1)
  return workdir


@pytest.fixture(autouse=True)
def kill_remaining_processes():
  yield
  many_processes.kill_all()


def run(workdir, setting, count, extra=(), **kwargs):
  many_processes.finish(launch(workdir, setting, count, extra, **kwargs))


def launch(workdir, setting, count, extra=(), **kwargs):
  env, keys = setting
  devices = DEVICES // count
  return many_processes.start(
    workdir, env, [*keys, *extra], count, devices=devices, **kwargs
  )


def stop_midway(workdir, setting, count, steps, **kwargs):
  """Start a run and stop it with SIGTERM after a number of steps."""

  def lines():
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0

  before = lines()
  processes = launch(workdir, setting, count, **kwargs)
  tiny_sweep.wait_for(lambda: lines() >= before + steps, processes[0])
  processes[-1].send_signal(signal.SIGTERM)  # One is enough.
  logs = many_processes.finish(processes)
  assert all("stopped at step" in log for log in logs), logs
  if before:
    assert all("resuming from step" in log for log in logs), logs


def assert_same_numbers(a, b):
  scores = [json.loads((x / "eval.json").read_text()) for x in (a, b)]
  assert scores[0]["examples"] == scores[1]["examples"] == 360
  for key in ("loss", "accuracy", "calibration_error", "train_accuracy"):
    np.testing.assert_allclose(scores[0][key], scores[1][key], atol=0.02)
  lines = []
  for workdir in (a, b):
    with open(workdir / "metrics.jsonl", encoding="utf-8") as f:
      lines.append([json.loads(line) for line in f])
  for x, y in zip(*lines, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_allclose(x[key], y[key], rtol=1e-4, err_msg=key)
  leaves = [
    jax.tree.leaves(checkpoint.load_variables(workdir, "latest")[:2])
    for workdir in (a, b)
  ]
  for x, y in zip(*leaves, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_one_process_resumes_a_run_of_two(setting, alone, tmp_path):
  """Slurm starts the first two processes."""
  stop_midway(tmp_path, setting, 2, steps=8, slurm=True)
  run(tmp_path, setting, 1)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "checkpoints",
    "class_names.json",
    "config.json",
    "confusion.csv",
    "confusion.png",
    "eval.json",
    "metrics.jsonl",
    "result.json",
  ]
  assert_same_numbers(alone, tmp_path)


@pytest.mark.slow
def test_any_number_of_processes_resumes_a_run(setting, alone, tmp_path):
  """A run resumes with 4, 1, 2 and 4 processes in turn."""
  for count in (4, 1, 2):
    stop_midway(tmp_path, setting, count, steps=8)
  # Finally, each process streams its own images.
  run(tmp_path, setting, 4, ["data.source=streaming"])
  assert_same_numbers(alone, tmp_path)


def test_two_processes_evaluate_together(setting, alone, tmp_path):
  env, keys = setting
  workdir = shutil.copytree(alone, tmp_path / "run")
  many_processes.finish(
    many_processes.start(
      workdir, env, keys, 2, "--mode=eval", devices=DEVICES // 2
    )
  )
  found = json.loads((workdir / "eval.json").read_text())
  result = json.loads((alone / "result.json").read_text())
  assert found["examples"] == result["examples_evaluated"]
  assert found["step"] == result["best_step"]
  assert found["accuracy"] == pytest.approx(result["best_accuracy"], abs=0.01)


@pytest.mark.slow
def test_processes_on_separate_hosts_train_as_one(setting, alone, tmp_path):
  """Each process streams its own images."""
  try:
    with networks.hosts(2) as commands:
      run(
        tmp_path,
        setting,
        2,
        ["sharding.fsdp=True", "data.source=streaming"],
        commands=commands,
        address=networks.address(0),
      )
  except PermissionError as e:
    pytest.skip(f"network namespaces cannot be made here: {e}")
  # Each process has half of the devices.
  assert len(run_reader.read(tmp_path).result["devices"]) == DEVICES
  assert_same_numbers(alone, tmp_path)


@pytest.mark.parametrize(
  "count, victim",
  [
    (2, 0),
    pytest.param(2, 1, marks=pytest.mark.slow),
    pytest.param(4, 0, marks=pytest.mark.slow),
    pytest.param(4, 2, marks=pytest.mark.slow),
  ],
)
def test_other_processes_stop_when_one_is_killed(
  setting, alone, tmp_path, count, victim
):
  processes = launch(tmp_path, setting, count, ["checkpoint_every=4"])
  saved = tmp_path / "checkpoints" / "last"
  tiny_sweep.wait_for(lambda: list(saved.glob("[0-9]*/SHA*")), processes[0])
  processes[victim].kill()
  start = time.monotonic()
  logs = many_processes.finish(processes, well=False)
  assert time.monotonic() - start < 60
  for i, (process, log) in enumerate(zip(processes, logs, strict=True)):
    if i != victim:
      assert process.returncode != 0
      if victim:
        assert f"process {victim} of " in log.splitlines()[-1], log
      else:  # JAX's message.
        assert "leader task" in log, log
  if victim:
    run(tmp_path, setting, count)
    assert_same_numbers(alone, tmp_path)


@pytest.mark.parametrize(
  "environment, expected",
  [
    ({}, False),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "4"}, True),
    ({"SLURM_STEP_NUM_TASKS": ""}, False),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    (
      {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
      True,
    ),
  ],
)
def test_processes_started_together_are_joined(
  monkeypatch, environment, expected
):
  for name in os.environ:
    if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_")):
      monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  joined = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **kwargs: joined.append(args)
  )
  monkeypatch.setattr(processes_lib, "_watch", lambda *args: None)
  processes_lib.join()
  assert bool(joined) == expected
  processes_lib.join(num_processes=1)
  assert len(joined) == expected
  processes_lib.join("localhost:1", 2, 1)
  assert joined[-1] == ("localhost:1", 2, 1)


@pytest.mark.parametrize(
  "args, words",
  [
    (("localhost:1",), "--num_processes"),
    (("localhost", 2, 0), "HOST:PORT"),
    (("localhost:port", 2, 0), "HOST:PORT"),
    (("localhost:70000", 2, 0), "HOST:PORT"),
    (("no-such-host.invalid:1", 2, 1), "cannot be used"),
  ],
)
def test_invalid_coordinator_flags_are_one_line_errors(args, words):
  with pytest.raises(errors.UserError, match=words):
    processes_lib.join(*args)


def test_port_in_use_is_a_one_line_error():
  with socket.socket() as s:
    s.bind(("", 0))
    s.listen()
    address = f"localhost:{s.getsockname()[1]}"
    with pytest.raises(errors.UserError, match="a free port"):
      processes_lib.join(address, 2, 0)


def test_continuous_heartbeats_do_not_abort_shutdown():
  program = """
import sys
import jax
from rescalevit_jax.distributed import processes
processes._SECONDS_BETWEEN_BEATS = 0.0
processes.join(sys.argv[1], 2, int(sys.argv[2]))
processes.wait_for_all("both are there")
assert jax.config.values["jax_cuda_visible_devices"] == "all"
"""
  # In a Slurm batch job, JAX would use one GPU.
  names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
  slurm = {f"SLURM_{name}": "0" for name in names}
  with socket.socket() as s:
    s.bind(("", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  both = [
    subprocess.Popen(
      [sys.executable, "-c", program, address, str(i)],
      cwd=paths.ROOT,
      env={**os.environ, **slurm, "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  logs = [process.communicate(timeout=120)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], logs


class FakeClient:
  """Fakes JAX's key-value store; heartbeats never change."""

  def __init__(self, beats):
    self._values = {f"{processes_lib._BEATS}/{i}": b for i, b in beats.items()}

  def key_value_set(self, key, value, allow_overwrite):
    assert allow_overwrite
    self._values[key] = value

  def key_value_dir_get(self, folder):
    assert folder == processes_lib._BEATS
    return list(self._values.items())


@pytest.mark.parametrize(
  "beats, missing",
  [({1: "7"}, "1"), ({1: processes_lib._END}, None), ({}, "1")],
)
def test_only_unfinished_silent_processes_are_reported(
  monkeypatch, capsys, beats, missing
):
  class Exit(BaseException):
    pass

  def leave(code):
    assert code == 1
    raise Exit

  monkeypatch.setattr(processes_lib, "_SILENCE", 0.1)
  monkeypatch.setattr(processes_lib, "_SECONDS_BETWEEN_BEATS", 0.01)
  monkeypatch.setattr(processes_lib.os, "_exit", leave)
  ended = threading.Event()
  timer = threading.Timer(0.5, ended.set)
  timer.start()
  try:
    processes_lib._watch(FakeClient(beats), 0, 2, ended)
    assert missing is None
  except Exit:
    assert f"process {missing} of 2 has died" in capsys.readouterr().err
    assert missing is not None
  timer.cancel()
