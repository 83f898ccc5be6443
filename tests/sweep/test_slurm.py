"""Jobs of submitit with fake Slurm commands.

tests/integration/test_cluster.py uses a real Slurm.
"""

import contextlib
import os
import signal
import sys
import threading

import fake_runs
import paths
import pytest
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import slurm
from rescalevit_jax.sweep import subprocess_run

pytest.importorskip("submitit")

NAME = "digits-ViT-XS_2-Rescale-scratch-seed"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """Put fake Slurm commands on PATH that log their arguments."""
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


def test_unfinished_runs_are_submitted_as_one_array(
  cluster, digits_dir, capsys
):
  done = cluster / "runs" / f"{NAME}1"
  args = flags(cluster, digits_dir, "--grid=seed=0,1,2,3")
  _, runs = command_line.parse(args)
  fake_runs.write(done, config_lib.flatten(runs[1].config), {})
  more = ["gpus_per_node=1", "slurm_partition=gpu", "cpus_per_task=8"]
  more += ["slurm_additional_parameters={'nice': 10}"]
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
    "#SBATCH --requeue",
    "#SBATCH --nice=10",
  ):
    assert line in batch.splitlines(), batch
  out, err = capsys.readouterr()
  assert [line.split() for line in out.splitlines()] == [
    [f"4242_{i}", str(cluster / "runs" / f"{NAME}{seed}")]
    for i, seed in enumerate((0, 2, 3))
  ]
  assert "squeue --jobs=4242" in err and "scancel 4242" in err


def test_diverged_runs_are_named_and_not_submitted(cluster, digits_dir, capsys):
  args = flags(cluster, digits_dir)
  _, (run,) = command_line.parse(args)
  fake_runs.write(run.workdir, config_lib.flatten(run.config))
  result_lib.write(run.workdir, result_lib.diverged(3, "step 3: loss nan"))
  assert command_line.main([*args, *SLURM]) == 1
  assert "step 3: loss nan" in capsys.readouterr().err
  assert not (cluster / "calls").exists()


def test_a_failed_run_fails_its_job(tmp_path):
  code = "print('error: step 3: loss nan'); raise SystemExit(1)"
  task = slurm.Task([sys.executable, "-c", code], tmp_path, str(paths.ROOT))
  with (
    contextlib.chdir("."),  # Goes back at the end: the task changes the folder.
    pytest.raises(RuntimeError, match="^error: step 3: loss nan$"),
  ):
    task()


def test_a_second_warning_lets_the_run_save(tmp_path):
  code = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True))\n"
    "print('ready', flush=True)\n"
    "signal.pause()\n"
    "time.sleep(1)\n"
  )
  command = [sys.executable, "-c", code]
  task = slurm.Task(command, tmp_path, "/")
  task._process = subprocess_run.start(command, tmp_path, {})
  log = tmp_path / "log.txt"
  tiny_sweep.wait_for(lambda: "\nready\n" in log.read_text())
  previous = signal.signal(signal.SIGUSR2, lambda *_: task.checkpoint())
  warn_again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2))
  warn_again.start()
  try:
    task.checkpoint()
    warn_again.join()
  finally:
    signal.signal(signal.SIGUSR2, previous)
  assert log.read_text().count("\nsaving") == 1


@pytest.mark.parametrize(
  "args, words",
  [
    (["--cluster=slurm"], ["timeout_min"]),
    ([*SLURM, "--slurm_args=timeout_min=1"], ["timeout_min", "twice"]),
    ([*SLURM, "--slurm_args=partition"], ["partition", "KEY=VALUE"]),
    ([*SLURM, "--slurm_args=slurm_partiton=a"], ["partiton", "partition"]),
    ([*SLURM, "--slurm_args=nodes=2"], ["nodes", "one process"]),
    ([*SLURM, "--slurm_args=gpus_per_node=many"], ["gpus_per_node"]),
    ([*SLURM, "--slurm_args=slurm_additional_parameters=x"], ["dictionary"]),
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


def test_slurm_parameters_are_python_values_or_text():
  texts = ["a=1", "b=x", "c=True", "d=['m load', 'n']", "e=1:00:00", "f=a=b"]
  texts.append("g={[]: 1}")
  assert slurm.parse_parameters(texts) == {
    "a": 1,
    "b": "x",
    "c": True,
    "d": ["m load", "n"],
    "e": "1:00:00",
    "f": "a=b",
    "g": "{[]: 1}",
  }
