"""Start a run as a subprocess and read its progress from its folder."""

from collections.abc import Mapping, Sequence
import datetime
import os
import pathlib
import shlex
import subprocess

from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.sweep import die_with_parent


def start(
  command: Sequence[str],
  workdir: pathlib.Path,
  environment: Mapping[str, str],
) -> subprocess.Popen:
  """Start a run with additional environment variables; log to WORKDIR/log.txt.

  The process has its own session, since Ctrl-C must reach it only through its
  parent. It dies with the parent; see `die_with_parent`.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  now = datetime.datetime.now().isoformat(" ", "seconds")
  with open(
    workdir / folder_lib.LOG, "a", encoding="utf-8", errors="backslashreplace"
  ) as log:
    log.write(f"{run_reader.LOG_HEADER}{now} {shlex.join(command)}\n")
    log.flush()
    return subprocess.Popen(
      die_with_parent.wrap(command),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **environment},
      start_new_session=True,
    )


def saved_step(workdir: pathlib.Path) -> int:
  """Return the step that a run would resume from, 0 without a checkpoint."""
  return max(folder_lib.saved_steps(workdir, "last"), default=0)


def step_since(workdir: pathlib.Path, time: float) -> int:
  """Return the last step in a run's metrics, or 0.

  A file that was last written before `time`, in seconds since 1970, is ignored.
  """
  path = workdir / folder_lib.METRICS
  if not path.exists() or path.stat().st_mtime < time:
    return 0
  metrics = run_reader.parse_metrics(run_reader.tail(path))
  return metrics[-1]["step"] if metrics else 0
