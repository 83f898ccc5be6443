"""Run measurements in subprocesses, one program each."""

from collections.abc import Mapping
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.benchmark import machine
from rescalevit_jax.runtime import malloc
from rescalevit_jax.sweep import die_with_parent
from rescalevit_jax.sweep import grid

_log = logging.getLogger(__name__)

_FIRST_STEP = "first step done"


def measure(
  run: grid.PlannedRun,
  subject: str,
  options: Mapping[str, float],
  timeout: float | None = None,
  same_malloc: bool = False,
) -> dict[str, Any]:
  """Return the measurements of one program in one round.

  Args:
    run: the run to measure, or to compare a peer with.
    subject: 'ours' or a key of `peers.PEERS`.
    options: values of the flags `seconds` and `eval_images`.
    timeout: seconds.
    same_malloc: give peers the malloc settings of `rescalevit_jax.main`.

  Raises:
    UserError: the process failed.
    subprocess.TimeoutExpired: the process exceeded the timeout.
  """
  command = [
    sys.executable,
    "-m",
    "rescalevit_jax.benchmark.worker",
    subject,
    config_lib.to_json(run.config),
    json.dumps(options),
  ]
  environment = machine.environment()
  if same_malloc or subject == "ours":  # As rescalevit_jax.main.
    environment = malloc.environment(environment)
  done = subprocess.run(
    die_with_parent.wrap(command),
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=timeout,
  )
  try:
    return json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError) as e:
    reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise errors.UserError(f"{run.workdir.name}, {subject}: {reason}") from e


def measure_starts(run: grid.PlannedRun) -> dict[str, Any]:
  """Return the seconds to the first step: cold start, then two warm starts.

  Raises:
    UserError: the run failed.
  """
  with tempfile.TemporaryDirectory() as folder:
    seconds = []
    for i in range(3):
      seconds.append(_seconds_to_first_step(run, pathlib.Path(folder), i))
      _log.info("start %d of %s: %.1f s", i, run.workdir.name, seconds[-1])
  return {"run": run.workdir.name, "cold": seconds[0], "warm": seconds[1:]}


def _seconds_to_first_step(run, folder, i):
  reason = "it printed nothing"
  start = time.monotonic()
  process = subprocess.Popen(
    [*run.command, f"--workdir={folder / str(i)}"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env=machine.environment() | {"XDG_CACHE_HOME": str(folder / "cache")},
  )
  try:
    for line in process.stderr:
      if _FIRST_STEP in line:
        return time.monotonic() - start
      reason = line.strip()
  finally:
    process.kill()
    process.communicate()
  raise errors.UserError(f"{run.workdir.name}: {reason}")
