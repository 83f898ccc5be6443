"""Execute a program that dies with its parent process.

  python -I die_with_parent.py PARENT_PID PROGRAM [ARGUMENT]...

A sweep killed by SIGKILL cannot stop its runs; they would still run when the
restarted sweep starts them again. On Linux a process can request a signal at
its parent's death (PR_SET_PDEATHSIG), and exec preserves the request. This
program makes the request and then executes the run. Python's preexec_fn is no
alternative: it can deadlock in a process with threads.

The kernel watches the parent thread, not the parent process. Start the program
from a thread that lives as long as the process, such as the main thread.
"""

from collections.abc import Sequence
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Of linux/prctl.h.


def wrap(command: Sequence[str]) -> list[str]:
  """Return a command whose process dies with this process."""
  # A path, since `-m` would import the whole package first.
  return [sys.executable, "-I", __file__, str(os.getpid()), *command]


def main() -> None:
  """Request the signal and execute the program."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(sys.argv[1]):
    return  # The parent died before the request.
  # Slurm announces a time-out with these signals, perhaps to every process of a
  # job. Only submitit's process must handle them; it sends SIGTERM to the run.
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  signal.signal(signal.SIGUSR2, signal.SIG_IGN)
  os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
  main()
