"""One run by several processes, as `srun` starts them."""

import os
import signal
import subprocess
import sys

import pytest
import tiny_sweep

from rescalevit_jax import runs


def start(workdir, env, keys):
  """Starts both processes of a step of Slurm, on this machine."""
  processes = []
  for i in range(2):
    step = {
      "SLURM_JOB_ID": str(os.getpid()),  # The port follows from it.
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_STEP_NUM_TASKS": "2",
      "SLURM_PROCID": str(i),
      "SLURM_LOCALID": str(i),
    }
    processes.append(
      subprocess.Popen(
        [
          sys.executable,
          "-m",
          "rescalevit_jax.main",
          "--config=configs/quickstart.py",
          f"--workdir={workdir}",
          *(f"--config.{key}" for key in keys),
        ],
        cwd=tiny_sweep.ROOT,
        env={**env, **step},
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return processes


def finish(processes):
  logs = [p.communicate(timeout=200)[1] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], logs
  return logs


def test_two_processes_train_stop_and_go_on(digits_dir, shared_dir, tmp_path):
  env = tiny_sweep.environment(shared_dir)
  keys = [*tiny_sweep.KEYS, f"tfds_data_dir={digits_dir}"]
  together = tmp_path / "together"
  processes = start(together, env, keys)
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(together), processes[0])
  processes[1].send_signal(signal.SIGTERM)  # One of them is enough.
  logs = finish(processes)
  assert all("stopped at step" in log for log in logs), logs
  logs = finish(start(together, env, keys))
  assert all("going on from the checkpoint" in log for log in logs), logs
  assert sorted(p.name for p in together.iterdir()) == [
    "checkpoints",
    "class_names.json",
    "config.json",
    "metrics.jsonl",
    "result.json",
  ]
  alone = tmp_path / "alone"
  subprocess.run(
    [
      sys.executable,
      "-m",
      "rescalevit_jax.main",
      "--config=configs/quickstart.py",
      f"--workdir={alone}",
      *(f"--config.{key}" for key in keys),
    ],
    cwd=tiny_sweep.ROOT,
    env={**env, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"},
    check=True,
    capture_output=True,
  )
  a, b = runs.read(together), runs.read(alone)
  assert len(a.result["devices"]) == 2 and len(b.result["devices"]) == 1
  for name in ("test/loss", "train/loss"):
    steps, losses = a.curve(name)
    assert steps == b.curve(name)[0]
    assert losses == pytest.approx(b.curve(name)[1], rel=1e-3)
