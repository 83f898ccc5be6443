"""Sweeps and runs under a real Slurm and a real Open MPI."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import paths
import pytest
import slurm_cluster
import tiny_sweep

from rescalevit_jax.distributed import processes

SWEEP = {"total_steps": "1000", "eval_every": "1000"}
SRUN = "srun --nodes=2 --ntasks=2 --kill-on-bad-exit".split()
MPIRUN = "mpirun -np 2 --allow-run-as-root --oversubscribe --bind-to none"
MPIRUN = MPIRUN.split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Return the environment variables for Slurm commands."""
  with slurm_cluster.start(tmp_path_factory.mktemp("slurm")) as env:
    yield env


@pytest.fixture(scope="module")
def setting(digits_dir, shared_dir):
  """Return the environment and config keys of a run."""
  keys = dict(key.split("=") for key in tiny_sweep.KEYS)
  keys["tfds_data_dir"] = str(digits_dir)
  return tiny_sweep.environment(shared_dir), keys


@pytest.fixture(scope="module")
def sweep(setting, slurm):
  """Return a function that submits a sweep and returns folders by job ID."""
  pytest.importorskip("submitit")
  env, keys = setting
  keys = {k: v for k, v in keys.items() if k != "checkpoint_every"}
  keys = [f"{k}={v}" for k, v in {**keys, **SWEEP}.items()]

  def submit(runs_dir, *args):
    args = (*args, "--cluster=slurm", "--slurm_args=timeout_min=10")
    # Two CPUs fill a node.
    args = (*args, "--slurm_args=cpus_per_task=2")
    done = tiny_sweep.run(runs_dir, *args, keys=keys, env={**env, **slurm})
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {job: pathlib.Path(folder) for job, folder in lines}

  return submit


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
  """Return an uninterrupted run of two processes under mpirun."""
  if not shutil.which("mpirun"):
    pytest.skip("mpirun not installed: apt-get install openmpi-bin")
  workdir = tmp_path_factory.mktemp("whole")
  process = start(workdir, setting, MPIRUN)
  assert process.wait(300) == 0, log(workdir)
  return workdir


def start(workdir, setting, launcher):
  """Start a run of several processes; write its output to `log`."""
  env, keys = setting
  command = [
    *launcher,
    *(sys.executable, "-m", "rescalevit_jax.main"),
    "--config=configs/quickstart.py",
    f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in keys.items()),
  ]
  with open(f"{workdir}.log", "ab") as file:
    return subprocess.Popen(
      command, cwd=paths.ROOT, env=env, stdout=file, stderr=file
    )


def log(workdir):
  return pathlib.Path(f"{workdir}.log").read_text()


def metrics(workdir):
  return (workdir / "metrics.jsonl").read_bytes()


def freeze(workdir):
  """Stop a run during training; SIGCONT resumes it."""
  tiny_sweep.wait_for(lambda: tiny_sweep.is_under_way(workdir))
  for pid in tiny_sweep.processes_of(workdir):
    os.kill(pid, signal.SIGSTOP)


def resume_after_warning(workdir, job):
  """Resume a frozen run after submitit has received Slurm's warning."""
  output = workdir.parent / ".submitit" / f"{job}_0_log.out"
  tiny_sweep.wait_for(lambda: "Caught signal SIGUSR2" in output.read_text())
  for pid in tiny_sweep.processes_of(workdir):
    os.kill(pid, signal.SIGCONT)


def wait_for_the_end(env):
  tiny_sweep.wait_for(
    lambda: slurm_cluster.call(["squeue", "--noheader"], env) == ""
  )


def check_starts(workdir, starts):
  text = (workdir / "log.txt").read_text()
  assert text.count("rescalevit_jax.main --config") == starts, text
  assert text.count("stopped at step") == starts - 1, text
  assert text.count("resuming from step") == starts - 1, text


@pytest.mark.slow
def test_tasks_of_a_sweep_survive_signals(sweep, slurm, tmp_path):
  """Runs with equal seeds have equal metrics."""
  args = ("--grid=seed=0,1", "--grid=checkpoint_every=3000,4000")
  submitted = sweep(tmp_path, *args, "--jobs=2")
  tasks, folders = list(submitted), list(submitted.values())
  array = tasks[0].partition("_")[0]
  assert tasks == [f"{array}_{i}" for i in range(4)]

  freeze(folders[0])
  slurm_cluster.call(["scancel", "--signal=USR2", tasks[0]], slurm)
  resume_after_warning(folders[0], tasks[0])
  # Freeze both before either can end.
  freeze(folders[2])
  freeze(folders[3])
  # An urgent job preempts a task. Slurm sends SIGCONT before SIGTERM.
  node = ["squeue", "--noheader", f"--jobs={tasks[2]}", "--format=%N"]
  node = slurm_cluster.call(node, slurm).strip()
  urgent = ["sbatch", "--partition=urgent", f"--nodelist={node}"]
  urgent += ["--cpus-per-task=2", "--output=/dev/null", "--wrap=true"]
  slurm_cluster.call(urgent, slurm)
  slurm_cluster.call(["scancel", tasks[3]], slurm)
  wait_for_the_end(slurm)

  finished = [(x / "result.json").exists() for x in folders]
  assert finished == [True, True, True, False]
  # Only unfinished runs are submitted again.
  assert list(sweep(tmp_path, *args).values()) == [folders[3]]
  wait_for_the_end(slurm)
  for i, starts in enumerate((2, 1, 2, 2)):
    check_starts(folders[i], starts)
    assert metrics(folders[i]) == metrics(folders[i // 2 * 2])
  assert sweep(tmp_path, *args) == {}


@pytest.mark.slow  # Slurm looks for time-outs twice a minute.
def test_a_task_that_times_out_resumes(sweep, slurm, tmp_path):
  args = ("--grid=checkpoint_every=3000,4000",)
  (job, workdir), (_, other) = sweep(tmp_path, *args).items()
  freeze(workdir)
  shorter = ["scontrol", "update", f"JobId={job}", "TimeLimit=1"]
  slurm_cluster.call(shorter, slurm)
  resume_after_warning(workdir, job)
  wait_for_the_end(slurm)
  check_starts(workdir, 2)
  assert metrics(workdir) == metrics(other)


@pytest.mark.slow
@pytest.mark.parametrize(
  "launcher, second",
  [(SRUN, "SLURM_PROCID"), (MPIRUN, "OMPI_COMM_WORLD_RANK")],
  ids=["srun", "mpirun"],
)
def test_two_processes_resume_after_one_is_killed(
  launcher, second, setting, slurm, whole, tmp_path
):
  env, keys = setting
  setting = {**env, **slurm}, keys
  workdir = tmp_path / "run"
  process = start(workdir, setting, launcher)
  saved = workdir / "checkpoints" / "last"
  tiny_sweep.wait_for(lambda: list(saved.glob("[0-9]*/SHA*")), process)
  for pid in tiny_sweep.processes_of(workdir):
    environ = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
    if f"{second}=1".encode() in environ.split(b"\0"):
      os.kill(pid, signal.SIGKILL)
  assert process.wait(300) != 0
  assert not (workdir / "result.json").exists()
  assert start(workdir, setting, launcher).wait(300) == 0, log(workdir)
  assert log(workdir).count("process 1 of 2; ") == 2
  assert log(workdir).count("resuming from step") == 2
  assert metrics(workdir) == metrics(whole)


@pytest.mark.parametrize(
  "flags, expected",
  [
    ("--nodes=2 --gpus-per-node=4", [[], []]),
    ("--nodes=1 --gpus-per-node=4", [[0, 1], [2, 3]]),
    ("--nodes=1 --gpus-per-node=2", [[0], [1]]),
    ("--nodes=1 --gpus-per-task=1", [[], []]),
    ("--nodes=1 --gpus-per-task=2", [[], []]),
    ("--nodes=1", [None, None]),
  ],
)
def test_processes_share_the_gpus_of_a_node(
  flags, expected, slurm, monkeypatch, tmp_path
):
  print_env = f"srun --ntasks=2 --output={tmp_path}/%t {flags} env"
  slurm_cluster.call(print_env.split(), slurm)
  for i, gpus in enumerate(expected):
    lines = (tmp_path / str(i)).read_text().splitlines()
    variables = dict(x.split("=", 1) for x in lines if "=" in x)
    monkeypatch.setattr(os, "environ", variables)
    assert processes.local_devices() == gpus
