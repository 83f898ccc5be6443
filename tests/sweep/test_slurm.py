"""Runs as jobs of submitit, with stand-ins for Slurm's programs."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import paths
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import slurm

pytest.importorskip("submitit")

NAME = "digits-ViT-XS_2-Rescale-scratch-seed"
# Long enough to be interrupted.
KEYS = ("total_steps=800", "checkpoint_every=800", "eval_every=400")


@pytest.fixture(scope="module")
def tiny(digits_dir, shared_dir):
  """Return the keyword arguments of tiny_sweep.run."""
  changed = {k.partition("=")[0] for k in KEYS}
  keys = [k for k in tiny_sweep.KEYS if k.partition("=")[0] not in changed]
  return {
    "keys": (*keys, *KEYS, f"tfds_data_dir={digits_dir}"),
    "env": tiny_sweep.environment(shared_dir),
  }


def children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [int(x) for x in path.read_text().split()]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """Put stand-ins for Slurm's programs on PATH that log their arguments."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("sbatch", "srun", "squeue", "sacct", "scontrol"):
    script = folder / name
    script.write_text(
      f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls\n'
      f'[ {name} = sbatch ] && cp "$1" {tmp_path}/batch.sh\n'
      "echo Submitted batch job 4242\n"
    )
    script.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return tmp_path


def flags(folder, digits_dir, *args, keys=tiny_sweep.KEYS):
  return [
    f"--config={paths.ROOT}/configs/quickstart.py",
    f"--runs_dir={folder / 'runs'}",
    f"--config.tfds_data_dir={digits_dir}",
    *(f"--config.{key}" for key in keys),
    *args,
  ]


SLURM = ("--cluster=slurm", "--slurm_args=timeout_min=600")


def test_unfinished_runs_are_submitted_as_one_array(
  cluster, digits_dir, capsys
):
  done = cluster / "runs" / f"{NAME}1"
  args = flags(cluster, digits_dir, "--grid=seed=0,1,2,3")
  _, runs = command_line.parse(args)
  done.mkdir(parents=True)
  (done / "config.json").write_text(config_lib.to_json(runs[1].config))
  result = {"last_accuracy": 0.5, "best_accuracy": 0.5, "best_step": 1}
  (done / "result.json").write_text(json.dumps(result))
  more = ["gpus_per_node=1", "slurm_partition=gpu", "cpus_per_task=8"]
  more = [f"--slurm_args={x}" for x in more]
  assert command_line.main([*args, *SLURM, *more, "--jobs=2"]) == 0
  batch = (cluster / "batch.sh").read_text()
  for line in (
    "#SBATCH --array=0-2%2",
    "#SBATCH --time=600",
    "#SBATCH --gpus-per-node=1",
    "#SBATCH --partition=gpu",
    "#SBATCH --cpus-per-task=8",
    "#SBATCH --signal=USR2@90",
    "#SBATCH --nodes=1",
  ):
    assert line in batch.splitlines(), batch
  out, err = capsys.readouterr()
  assert [line.split() for line in out.splitlines()] == [
    [f"4242_{i}", str(cluster / "runs" / f"{NAME}{seed}")]
    for i, seed in enumerate((0, 2, 3))
  ]
  assert "squeue --jobs=4242" in err and "scancel 4242" in err


def test_a_preempted_job_is_requeued_and_resumes(
  cluster, digits_dir, tiny, tmp_path
):
  """Do what a node does with the second job of an array."""
  keys = [k for k in tiny["keys"] if not k.startswith("tfds_data_dir")]
  args = flags(cluster, digits_dir, "--grid=seed=0,1", keys=keys)
  assert command_line.main([*args, *SLURM]) == 0
  env = {
    **tiny["env"],
    "PATH": os.environ["PATH"],
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "4244",
    "SLURM_ARRAY_JOB_ID": "4242",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
  }
  command = [sys.executable, "-m", "submitit.core._submit"]
  command.append(str(cluster / "runs" / ".submitit"))
  workdir = cluster / "runs" / f"{NAME}1"
  job = subprocess.Popen(command, env=env, cwd=paths.ROOT)
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(workdir), job)
  # Slurm may signal every process of the job.
  for pid in children(job.pid):
    os.kill(pid, signal.SIGUSR2)
  job.send_signal(signal.SIGUSR2)
  assert job.wait(timeout=60) != 0
  assert "scontrol requeue 4242_1" in (cluster / "calls").read_text()
  assert not (workdir / "result.json").exists()
  assert subprocess.run(command, env=env, cwd=paths.ROOT).returncode == 0
  assert (workdir / "result.json").exists()
  assert not (cluster / "runs" / f"{NAME}0").exists()
  log = (workdir / "log.txt").read_text()
  assert log.count("rescalevit_jax.main --config") == 2
  stopped = int(re.search(r"stopped at step (\d+) of 800", log).group(1))
  assert 0 < stopped < 800

  again = tmp_path / "again"
  done = tiny_sweep.run(again, "--grid=seed=1", **tiny)
  assert done.returncode == 0, done.stderr
  for name in ("metrics.jsonl", "config.json"):
    files = [folder / name for folder in (workdir, again / workdir.name)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_run_fails_its_job(tmp_path):
  code = "print('error: step 3: loss nan'); raise SystemExit(1)"
  task = slurm.Task([sys.executable, "-c", code], tmp_path, str(paths.ROOT))
  cwd = os.getcwd()
  try:
    with pytest.raises(RuntimeError, match="^error: step 3: loss nan$"):
      task()
  finally:
    os.chdir(cwd)


@pytest.mark.parametrize(
  "args, words",
  [
    (["--cluster=slurm"], ["timeout_min"]),
    ([*SLURM, "--slurm_args=timeout_min=1"], ["timeout_min", "twice"]),
    ([*SLURM, "--slurm_args=partition"], ["partition", "KEY=VALUE"]),
    ([*SLURM, "--slurm_args=slurm_partiton=a"], ["partiton", "partition"]),
    ([*SLURM, "--slurm_args=nodes=2"], ["nodes", "one process"]),
    ([*SLURM, "--slurm_args=gpus_per_node=many"], ["gpus_per_node"]),
  ],
)
def test_invalid_parameters_are_reported_in_one_line(
  args, words, cluster, digits_dir, capsys
):
  assert command_line.main(flags(cluster, digits_dir, *args)) in (1, 2)
  err = capsys.readouterr().err.splitlines()
  assert err[-1].startswith("error: ")
  for word in words:
    assert word in err[-1]
  assert not (cluster / "calls").exists()
  assert not list(cluster.glob("runs/digits*"))


def test_a_missing_slurm_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(errors.UserError, match="srun"):
    slurm.create_executor(tmp_path, {"timeout_min": 1}, None)


def test_a_missing_submitit_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '\.\[slurm\]'"):
    slurm.create_executor(tmp_path, {}, None)


def test_parameters_are_python_values_or_text():
  texts = ["a=1", "b=x", "c=True", "d=['m load', 'n']", "e=1:00:00", "f=a=b"]
  assert slurm.parse_parameters(texts) == {
    "a": 1,
    "b": "x",
    "c": True,
    "d": ["m load", "n"],
    "e": "1:00:00",
    "f": "a=b",
  }
