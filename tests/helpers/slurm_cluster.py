"""A Slurm cluster with one controller and two nodes on this machine.

It needs no root and does not affect other installations of Slurm.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import time

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_PORTS = ("controller", "first", "second")
# These names resolve everywhere. JobRequeue=0: requeue only jobs that allow it.
# cred_expire: seconds that a requeued job waits, at least 5.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=0
KillWait=60
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 \
Port=[{first},{second}] CPUs=2 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
# Slurm assigns the GPUs but does not use them.
_GPUS = "NodeName=127.0.0.[1-2] Name=gpu File=/dev/tty[0-3]\n"


@contextlib.contextmanager
def start(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """Start Slurm and stop it afterwards; skip the test if it is not installed.

  Args:
    folder: folder for Slurm's files; its path must be short for sockets.

  Yields:
    The environment variables of Slurm's programs.
  """
  path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
  if missing := [x for x in _PROGRAMS if not shutil.which(x, path=path)]:
    pytest.skip(f"{missing} not installed: apt-get install slurm-wlm munge")
  env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
  (folder / "state").mkdir()
  (folder / "slurm.conf").write_text(
    _CONFIG.format(
      folder=folder,
      host=socket.gethostname(),
      user=pwd.getpwuid(os.getuid()).pw_name,
      **_free_ports(),
    )
  )
  (folder / "gres.conf").write_text(_GPUS)
  key = folder / "munge.key"
  key.touch(0o600)
  key.write_bytes(os.urandom(128))
  munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
  for name in ("socket", "pid", "seed", "log"):
    option = name if name == "socket" else f"{name}-file"
    munged.append(f"--{option}={folder}/munge.{name}")
  with contextlib.ExitStack() as stack:
    for name, command in (
      ("munged", munged),
      ("slurmctld", ["slurmctld", "-D", "-i"]),
      ("slurmd1", ["slurmd", "-D", "-N", "127.0.0.1"]),
      ("slurmd2", ["slurmd", "-D", "-N", "127.0.0.2"]),
    ):
      log = stack.enter_context(open(folder / f"{name}.out", "wb"))
      process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=log, stderr=log
      )
      stack.callback(process.wait)
      stack.callback(process.terminate)
    _wait_until(lambda: _says("sinfo --noheader --format=%t%D", env) == "idle2")
    try:
      yield env
    finally:
      call(["scancel", f"--user={os.getuid()}"], env)
      call(["scancel", f"--user={os.getuid()}", "--signal=KILL"], env)
      _wait_until(lambda: _says("squeue --noheader", env) == "")


def call(command: Sequence[str], env: Mapping[str, str]) -> str:
  """Run a Slurm command; return its output."""
  done = subprocess.run(
    command, env={**os.environ, **env}, capture_output=True, text=True
  )
  assert done.returncode == 0, (command, done.stdout, done.stderr)
  return done.stdout


def _says(command, env):
  """Return a command's output, or None if it fails."""
  with contextlib.suppress(AssertionError):
    return call(command.split(), env).strip()
  return None


def _wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.2)


def _free_ports():
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in _PORTS]
    for s in sockets:
      s.bind(("", 0))
    ports = (s.getsockname()[1] for s in sockets)
    return dict(zip(_PORTS, ports, strict=True))
