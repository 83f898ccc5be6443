"""The same runs as jobs of submitit: local ones, and Slurm's on paper."""

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
from rescalevit_jax import sweep
from rescalevit_jax.sweep import cluster

pytest.importorskip("submitit")

NAME = "digits-ViT-XS_2-Rescale-scratch-seed"
# Long enough to be interrupted.
KEYS = ("total_steps=800", "checkpoint_every=800", "eval_every=400")


@pytest.fixture(scope="module")
def tiny(digits_dir, shared_dir):
  changed = {k.partition("=")[0] for k in KEYS}
  keys = [k for k in tiny_sweep.KEYS if k.partition("=")[0] not in changed]
  return {
    "keys": (*keys, *KEYS, f"tfds_data_dir={digits_dir}"),
    "env": tiny_sweep.environment(shared_dir),
  }


def children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [int(x) for x in path.read_text().split()]


def test_a_preempted_job_goes_on(tiny, tmp_path):
  """submitit's signal: the run saves and stops, the job starts it again."""
  process = tiny_sweep.start(tmp_path, "--cluster=local", **tiny)
  job = None
  for line in process.stderr:
    if match := re.search(r"seed0: job (\d+)$", line):
      job = int(match.group(1))
      break
  workdir = tmp_path / f"{NAME}0"
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(workdir), process)
  (task,) = children(job)
  # A preemption; Slurm may signal every process of the job.
  os.kill(task, signal.SIGUSR2)
  for pid in children(task):
    os.kill(pid, signal.SIGUSR2)
  _, stderr = process.communicate(timeout=200)
  assert process.returncode == 0, stderr
  assert stderr.splitlines()[-1].endswith(" 1 done, 0 failed")
  log = (workdir / "log.txt").read_text()
  assert log.count("rescalevit_jax.main --config") == 2
  stopped = int(re.search(r"stopped at step (\d+) of 800", log).group(1))
  assert 0 < stopped < 800
  assert f"resuming from step {stopped}\n" in log
  assert "finished: test accuracy" in log.splitlines()[-1]
  errors_of_job = list((tmp_path / ".submitit").glob("*.err"))
  assert "preempted" in "".join(p.read_text() for p in errors_of_job)

  again = tmp_path / "again"
  done = tiny_sweep.run(again, **tiny)
  assert done.returncode == 0, done.stderr
  for name in ("metrics.jsonl", "config.json"):
    paths = [x / f"{NAME}0" / name for x in (tmp_path, again)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failing_job_is_named(tiny, tmp_path):
  done = tiny_sweep.run(
    tmp_path, "--cluster=local", "--grid=base_lr=1e30", **tiny
  )
  assert done.returncode == 1
  assert "1 failed" in done.stderr
  assert re.search(r"failed: .*base_lr=1e\+30: error: step .*", done.stderr)
  assert "Traceback" not in done.stderr
  # As submitit and Slurm see it.
  (log,) = (tmp_path / ".submitit").glob("*.err")
  assert "RuntimeError: error: step " in log.read_text()


def test_an_interrupted_local_sweep_leaves_no_process(tiny, tmp_path):
  previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
  process = tiny_sweep.start(tmp_path, "--cluster=local", **tiny)
  signal.signal(signal.SIGHUP, previous)
  workdir = tmp_path / f"{NAME}0"
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(workdir), process)
  process.send_signal(signal.SIGHUP)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1.5)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130
  assert stderr.splitlines()[-1].startswith("error: interrupted; the same")
  tiny_sweep.wait_for(lambda: not tiny_sweep.processes_of(tmp_path))
  assert not (workdir / "result.json").exists()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Programs named as Slurm's that only note what they are given."""
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


def flags(folder, digits_dir, *args):
  return [
    f"--config={paths.ROOT}/configs/quickstart.py",
    f"--runs_dir={folder / 'runs'}",
    f"--config.tfds_data_dir={digits_dir}",
    *(f"--config.{key}" for key in tiny_sweep.KEYS),
    *args,
  ]


SLURM = ("--cluster=slurm", "--slurm_args=timeout_min=600")


def test_a_slurm_array(slurm, digits_dir, capsys):
  done = slurm / "runs" / f"{NAME}1"
  args = flags(slurm, digits_dir, "--grid=seed=0,1,2,3")
  _, runs = sweep.parse(args)
  done.mkdir(parents=True)
  (done / "config.json").write_text(config_lib.to_json(runs[1].config))
  result = {"last_accuracy": 0.5, "best_accuracy": 0.5, "best_step": 1}
  (done / "result.json").write_text(json.dumps(result))
  more = ["gpus_per_node=1", "slurm_partition=gpu", "cpus_per_task=8"]
  more = [f"--slurm_args={x}" for x in more]
  assert sweep.main([*args, *SLURM, *more, "--jobs=2"]) == 0
  batch = (slurm / "batch.sh").read_text()
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
    [f"4242_{i}", str(slurm / "runs" / f"{NAME}{seed}")]
    for i, seed in enumerate((0, 2, 3))
  ]
  assert "squeue --jobs=4242" in err and "scancel 4242" in err


def test_slurm_starts_stops_and_requeues_a_job(slurm, digits_dir, tiny):
  """What a node would do with the second job of the array."""
  args = flags(slurm, digits_dir, "--grid=seed=0,1")
  assert sweep.main([*args, *SLURM]) == 0
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
  command.append(str(slurm / "runs" / ".submitit"))
  workdir = slurm / "runs" / f"{NAME}1"
  job = subprocess.Popen(command, env=env, cwd=paths.ROOT)
  tiny_sweep.wait_for(lambda: (workdir / "log.txt").exists(), job)
  job.send_signal(signal.SIGUSR2)
  assert job.wait(timeout=60) != 0
  assert "scontrol requeue 4242_1" in (slurm / "calls").read_text()
  assert not (workdir / "result.json").exists()
  assert subprocess.run(command, env=env, cwd=paths.ROOT).returncode == 0
  assert (workdir / "result.json").exists()
  assert not (slurm / "runs" / f"{NAME}0").exists()


@pytest.mark.parametrize(
  "args, words",
  [
    (["--cluster=slurm"], ["timeout_min"]),
    ([*SLURM, "--slurm_args=timeout_min=1"], ["timeout_min", "twice"]),
    ([*SLURM, "--slurm_args=partition"], ["partition", "KEY=VALUE"]),
    ([*SLURM, "--slurm_args=slurm_partiton=a"], ["partiton", "partition"]),
    ([*SLURM, "--slurm_args=nodes=2"], ["nodes", "1"]),
    ([*SLURM, "--slurm_args=gpus_per_node=many"], ["gpus_per_node"]),
  ],
)
def test_mistakes(args, words, slurm, digits_dir, capsys):
  assert sweep.main(flags(slurm, digits_dir, *args)) in (1, 2)
  err = capsys.readouterr().err.splitlines()
  assert err[-1].startswith("error: ")
  for word in words:
    assert word in err[-1]
  assert not (slurm / "calls").exists()
  assert not list(slurm.glob("runs/digits*"))


def test_without_slurm(digits_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(errors.UserError, match="srun"):
    cluster.executor("slurm", tmp_path, {"timeout_min": 1}, None)


def test_without_submitit(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '\.\[slurm\]'"):
    cluster.executor("local", tmp_path, {}, None)


def test_parameters_are_python_values_or_text():
  texts = ["a=1", "b=x", "c=True", "d=['m load', 'n']", "e=1:00:00", "f=a=b"]
  assert cluster.parse_parameters(texts) == {
    "a": 1,
    "b": "x",
    "c": True,
    "d": ["m load", "n"],
    "e": "1:00:00",
    "f": "a=b",
  }
