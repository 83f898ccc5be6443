"""Run commands of the package in processes that need not import its libraries.

They are forked from a process that has imported them, which saves two seconds
of processor time each. JAX has not started its threads there.
"""

from collections.abc import Mapping, Sequence
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

import paths
import rare_gc

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
  [
    "matplotlib.figure",
    "rescalevit_jax.training.evaluate_run",
    "rescalevit_jax.training.train",
  ]
)


class Popen:
  """A command, with the methods of `subprocess.Popen` that tests need.

  Args:
    args: what would follow `python -m`.
    env: its environment.
    stderr: a file for its stderr.
    stdout: a file for its stdout.
  """

  def __init__(
    self,
    args: Sequence[str],
    env: Mapping[str, str],
    stderr: str | os.PathLike,
    stdout: str | os.PathLike = os.devnull,
  ):
    self.args = list(args)
    pathlib.Path(stderr).write_bytes(b"")  # Tests read it from the start.
    self._process = _CONTEXT.Process(
      target=_run, args=(self.args, dict(env), str(stdout), str(stderr))
    )
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  poll = returncode.fget

  def wait(self, timeout: float | None = None) -> int:
    self._process.join(timeout)
    if self.returncode is None:
      raise subprocess.TimeoutExpired(self.args, timeout)
    return self.returncode

  def send_signal(self, number: int) -> None:
    if self.returncode is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def run(
  args: Sequence[str], env: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
  """Run a command to its end; like `subprocess.run`, with its output."""
  with tempfile.TemporaryDirectory() as folder:
    out, err = (pathlib.Path(folder, name) for name in ("out", "err"))
    process = Popen(args, env, err, out)
    try:
      code = process.wait(timeout)
    finally:
      process.kill()
    return subprocess.CompletedProcess(
      args, code, out.read_text(), err.read_text()
    )


def _run(args, env, stdout, stderr):
  import jax

  rare_gc.switch_on()
  os.chdir(paths.ROOT)
  os.environ.clear()
  os.environ.update(env)
  for number, path in ((1, stdout), (2, stderr)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.path[:0] = [str(paths.ROOT), *env.get("PYTHONPATH", "").split(":")]
  # JAX has read those of the process that it was forked from.
  for name, kind in (
    ("jax_platforms", str),
    ("jax_compilation_cache_dir", str),
    ("jax_persistent_cache_min_compile_time_secs", float),
  ):
    if value := env.get(name.upper()):
      jax.config.update(name, kind(value))
  sys.argv = list(args)
  runpy.run_module(args[0], run_name="__main__", alter_sys=True)
