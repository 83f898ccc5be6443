"""Start one run in several processes with separate devices."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import socket
import subprocess
import sys

import paths

_STARTED = []


def kill_all() -> None:
  """Kill all processes that a test has left."""
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
  """Start the processes of a run.

  Args:
    workdir: folder of the run.
    env: environment variables of all processes.
    keys: config overrides, KEY=VALUE.
    count: number of processes.
    *args: more command-line arguments.
    devices: number of devices per process.
    commands: prefix of each process's command.
    address: address of the first process.
    slurm: set Slurm's environment variables instead of passing flags.
  """

  def step(i):
    return {
      "SLURM_JOB_ID": str(os.getpid()),  # Determines the port.
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
  """Wait for all processes; return their stderr.

  Args:
    processes: processes of a run.
    well: require exit code 0 of each.
  """
  logs = [p.communicate(timeout=600)[1] for p in processes]
  if well:
    assert not any(p.returncode for p in processes), "\n".join(logs)
  return logs
