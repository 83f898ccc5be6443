"""One run by several processes, each with devices of its own."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import socket
import subprocess
import sys

import paths

_STARTED = []


def kill_all() -> None:
  """Ends what a test has left running."""
  for process in _STARTED:
    process.kill()
    process.communicate()
  _STARTED.clear()


def start(
  workdir: pathlib.Path,
  env: Mapping[str, str],
  keys: Sequence[str],
  count: int,
  *args: str,
  devices: int,
  commands: Sequence[Sequence[str]] = (),
  address: str = "127.0.0.1",
  slurm: bool = False,
) -> list[subprocess.Popen]:
  """Starts the processes of a run.

  Args:
    workdir: of the run.
    env: of all of them.
    keys: of the config, KEY=VALUE.
    count: of the processes.
    *args: of the command line, beside the usual ones.
    devices: of each.
    commands: what to put before each one's command.
    address: of the first; one alone needs none.
    slurm: whether the environment tells them who they are, as in a step of
      Slurm on this machine, instead of flags.
  """

  def step(i):
    return {
      "SLURM_JOB_ID": str(os.getpid()),  # The port follows from it.
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": str(count),
      "SLURM_STEP_NUM_TASKS": str(count),
      "SLURM_PROCID": str(i),
      "SLURM_LOCALID": str(i),
    }

  devices = f"--xla_force_host_platform_device_count={devices}"
  env = {**env, "XLA_FLAGS": f"{env['XLA_FLAGS']} {devices}"}
  with socket.socket() as s:
    s.bind(("", 0))
    port = s.getsockname()[1]

  def flags(i):
    return (
      f"--coordinator={address}:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    )

  processes = [
    subprocess.Popen(
      [
        *(commands[i] if commands else ()),
        sys.executable,
        "-m",
        "rescalevit_jax.main",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *(() if slurm or count == 1 else flags(i)),
        *(f"--config.{key}" for key in keys),
        *args,
      ],
      cwd=paths.ROOT,
      env={**env, **(step(i) if slurm else {})},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  _STARTED.extend(processes)
  return processes


def finish(
  processes: Sequence[subprocess.Popen], well: bool = True
) -> list[str]:
  """Waits for the processes' ends; returns what they wrote to stderr.

  Args:
    processes: of a run.
    well: whether all of them must end without an error.
  """
  logs = [p.communicate(timeout=600)[1] for p in processes]
  if well:
    assert not any(p.returncode for p in processes), "\n".join(logs)
  return logs
