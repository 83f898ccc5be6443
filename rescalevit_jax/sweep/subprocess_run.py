"""Starts a run as a process of its own, and looks at how it is doing."""

from collections.abc import Mapping, Sequence
import contextlib
import datetime
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

from rescalevit_jax import errors
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import die_with_parent


def start(
  command: Sequence[str],
  workdir: pathlib.Path,
  environment: Mapping[str, str],
) -> subprocess.Popen:
  """Starts a run; what it says goes to WORKDIR/log.txt, after what is there.

  The process is in a session of its own, so that Ctrl-C reaches it only through
  its parent, and it does not outlive the parent: see `tied`.

  Args:
    command: the program with its arguments.
    workdir: the run's folder; made if it is not there.
    environment: variables to set besides this process's.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  now = datetime.datetime.now().isoformat(" ", "seconds")
  with open(
    workdir / folder_lib.LOG, "a", encoding="utf-8", errors="backslashreplace"
  ) as log:
    log.write(f"{run_reader.LOG_HEADER}{now} {shlex.join(command)}\n")
    log.flush()
    return subprocess.Popen(
      tie(command),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **environment},
      start_new_session=True,
    )


def tie(command: Sequence[str]) -> list[str]:
  """Returns a command that does not outlive this process: see `tied`."""
  # By its path: as a module it would have to wait for the package's imports.
  return [
    sys.executable,
    "-I",
    die_with_parent.__file__,
    str(os.getpid()),
    *command,
  ]


def kill(process: subprocess.Popen) -> None:
  """Ends a run at once, with all that it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


def failure(workdir: pathlib.Path, returncode: int | None) -> str | None:
  """Return why a run's process ended without a result, None if it has one.

  Args:
    workdir: the run's folder.
    returncode: of its process; None if it is not known.
  """
  try:
    result = result_lib.read(workdir)
  except errors.UserError as e:
    return f"error: {e}"
  if result_lib.is_finished(result):
    return None
  line = run_reader.last_log_line(workdir)
  if line.startswith("error: "):
    return line
  if result_lib.has_diverged(result):
    return f"error: {result['error']}"
  if returncode == 0:
    return "error: stopped by a signal; the same command goes on"
  if returncode is None:
    ended = "it ended before its end"
  elif returncode < 0:
    ended = f"killed by {_signal_name(-returncode)}"
  else:
    ended = f"ended with exit code {returncode}"
  return f"error: {ended}; last line of its log: {line}"


def _signal_name(number):
  try:
    return signal.Signals(number).name
  except ValueError:  # A real-time signal.
    return f"signal {number}"


def saved_step(workdir: pathlib.Path) -> int:
  """Returns the step that a run would go on from, 0 for the start."""
  return max(folder_lib.saved_steps(workdir, "last"), default=0)


def step_since(workdir: pathlib.Path, time: float) -> int:
  """Returns the last step that a run has written metrics of.

  Args:
    workdir: the run's folder.
    time: what was written before is left out, as of an earlier start; in
      seconds since 1970.
  """
  path = workdir / folder_lib.METRICS
  try:
    if path.stat().st_mtime < time:
      return 0
  except FileNotFoundError:
    return 0
  for line in reversed(run_reader.tail(path)):
    with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
      return json.loads(line)["step"]  # The last line may be half written.
  return 0
