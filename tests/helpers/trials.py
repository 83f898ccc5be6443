"""Start training in subprocesses and check the run's folder."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import forked
import jax
import numpy as np
import orbax.checkpoint as ocp
import paths
import tiny_sweep

from rescalevit_jax.runs import checksums
from rescalevit_jax.runs import folder as folder_lib

TOTAL_STEPS = 24
EVAL_EVERY = 3
# Writes metrics at each step.
KEYS = (
  *tiny_sweep.KEYS,
  f"total_steps={TOTAL_STEPS}",
  f"eval_every={EVAL_EVERY}",
  "progress_every=1",
  "checkpoint_every=2",
  "batch_eval=5",
)
# Keys of result.json that differ between equal runs.
_TIMES = ("seconds", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Trial:
  """A run that is started repeatedly.

  Attributes:
    workdir: folder of the run.
    log: file for stderr of the latest process.
    keys: config overrides, KEY=VALUE.
    env: environment variables of its processes.
  """

  workdir: pathlib.Path
  log: pathlib.Path
  keys: tuple[str, ...]
  env: Mapping[str, str]

  def start(self, **env: str) -> subprocess.Popen:
    """Start the run as a user does."""
    with open(self.log, "wb") as log:
      return subprocess.Popen(
        [sys.executable, "-m", *self._command()],
        cwd=paths.ROOT,
        env={**self.env, **env},
        stderr=log,
      )

  def fork(self) -> forked.Popen:
    """Start the run faster, in a forked process."""
    return forked.Popen(self._command(), self.env, self.log)

  def _command(self):
    return [
      "rescalevit_jax.main",
      "--config=configs/quickstart.py",
      f"--workdir={self.workdir}",
      *(f"--config.{key}" for key in self.keys),
    ]

  def finish(self) -> None:
    """Run to the end."""
    code = self.fork().wait(timeout=300)
    assert code == 0, (code, self.said())

  def fail(self) -> str:
    """Run until it fails; return its error line."""
    return self.error(self.fork())

  def error(self, process: subprocess.Popen | forked.Popen) -> str:
    """Wait for a process to fail; return its only error line."""
    code, log = process.wait(timeout=300), self.said()
    errors = [x for x in log.splitlines() if x.startswith("error: ")]
    assert code == 1, (code, log)
    assert len(errors) == 1 and log.splitlines()[-1] == errors[0], log
    assert "Traceback" not in log, log
    return errors[0]

  def said(self) -> str:
    """Return stderr of the latest process so far."""
    return self.log.read_text()

  def metrics(self) -> bytes:
    """Return the content of metrics.jsonl, or b"" if it does not exist."""
    try:
      return (self.workdir / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
      return b""

  def wait_for_lines(
    self, number: int, process: subprocess.Popen | forked.Popen
  ) -> None:
    """Wait until metrics.jsonl has `number` lines."""
    wait_for(lambda: self.metrics().count(b"\n") >= number, process)


def wait_for(
  condition: Callable[[], bool], process: subprocess.Popen | forked.Popen
) -> bool:
  """Wait until a condition holds; return False if the process ends first."""
  deadline = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < deadline
    if process.poll() is not None:
      return False
    time.sleep(0.002)
  return True


def freeze(process: subprocess.Popen | forked.Popen) -> bool:
  """Stop a process; return False if it has ended."""
  process.send_signal(signal.SIGSTOP)
  stat = pathlib.Path(f"/proc/{process.pid}/stat")

  def stopped():
    with contextlib.suppress(OSError):  # The process has just ended.
      return stat.read_text().rpartition(")")[2].split()[0] == "T"

  return wait_for(stopped, process)


def check_sane(trial: Trial, whole: Trial) -> None:
  """Check the folder of an interrupted run.

  Args:
    trial: the run, without a live process.
    whole: the same run, uninterrupted.
  """
  for name in ("config.json", "class_names.json", "result.json"):
    path = trial.workdir / name
    assert not path.exists() or json.loads(path.read_text())
  # No step is missing or repeated; only the last line may be incomplete.
  # A removed disk leaves zeros for unwritten bytes.
  metrics = trial.metrics().rstrip(b"\0")
  assert whole.metrics().startswith(metrics), metrics
  for kind in ("last", "best"):
    if steps := folder_lib.saved_steps(trial.workdir, kind):
      checksums.verify(_folder(trial, kind, steps[-1]))


def check_same(trial: Trial, whole: Trial) -> None:
  """Check that two finished runs are equal, bit for bit."""
  names = [
    sorted(p.name for p in x.workdir.iterdir() if "tfevents" not in p.name)
    for x in (trial, whole)
  ]
  assert names[0] == names[1]
  assert trial.metrics() == whole.metrics()
  for name in ("config.json", "class_names.json", "result.json"):
    a, b = (json.loads((x.workdir / name).read_text()) for x in (trial, whole))
    assert _without_times(a) == _without_times(b)
  for kind in ("last", "best"):
    a, b = (folder_lib.saved_steps(x.workdir, kind)[-1] for x in (trial, whole))
    assert a == b
    a, b = (_folder(x, kind, a) for x in (trial, whole))
    items = ["variables", "optimizer"] if kind == "last" else ["variables"]
    if (b / "loss_scale").exists():
      items.append("loss_scale")
    for item in items:
      _check_same_arrays(a / item, b / item)


def _check_same_arrays(a, b):
  with ocp.StandardCheckpointer() as checkpointer:
    a, b = (
      jax.tree_util.tree_leaves_with_path(checkpointer.restore(x))
      for x in (a, b)
    )
  assert len(a) > 1
  for (path_a, x), (path_b, y) in zip(a, b, strict=True):
    assert path_a == path_b and x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path_a


def _folder(trial, kind, step):
  return trial.workdir / "checkpoints" / kind / str(step)


def _without_times(values: Any) -> Any:
  if not isinstance(values, dict):
    return values
  return {k: v for k, v in values.items() if k not in _TIMES}
