"""Fork commands from a process that has imported the package's libraries.

Each fork saves two seconds of CPU time. The forked process has not started
JAX's threads.
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
  """A forked command with the interface of `subprocess.Popen`.

  Args:
    args: arguments after `python -m`.
    env: environment variables.
    stderr: file for stderr.
    stdout: file for stdout.
  """

  def __init__(
    self,
    args: Sequence[str],
    env: Mapping[str, str],
    stderr: str | os.PathLike,
    stdout: str | os.PathLike = os.devnull,
  ):
    self.args = list(args)
    pathlib.Path(stderr).write_bytes(b"")  # Tests read it early.
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
  """Run a command and capture its output, like `subprocess.run`."""
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
  # JAX has read the variables of the parent process.
  for name, kind in (
    ("jax_platforms", str),
    ("jax_compilation_cache_dir", str),
    ("jax_persistent_cache_min_compile_time_secs", float),
  ):
    if value := env.get(name.upper()):
      jax.config.update(name, kind(value))
  sys.argv = list(args)
  runpy.run_module(args[0], run_name="__main__", alter_sys=True)
