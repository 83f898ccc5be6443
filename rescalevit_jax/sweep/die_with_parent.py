"""Becomes another program, one that does not outlive its parent.

  python -I tied.py PARENT_PID PROGRAM [ARGUMENT]...

A sweep that is killed by SIGKILL cannot stop its runs. Had they no tie to it,
they would go on while the sweep, started again, starts them once more. Linux
kills a process along with its parent if the process asks for that, and it stays
asked for through exec. A program that asks and then becomes the run does it
without Python's preexec_fn, which may hang in a process with threads.

What the system watches is the thread that started the process: it has to live
as long as the parent, as the main thread does.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Of linux/prctl.h.


def main() -> None:
  """Ties this process to its parent and becomes the program."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(sys.argv[1]):
    return  # The parent died before it was asked for.
  # With these submitit is told of a time-out. Slurm may send them to every
  # process of a job, and a run would die of them; submitit's own sends SIGTERM.
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  signal.signal(signal.SIGUSR2, signal.SIG_IGN)
  os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
  main()
