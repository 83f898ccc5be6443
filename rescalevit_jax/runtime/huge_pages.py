"""Huge pages for the arrays of a training step on a CPU.

XLA allocates a step's memory by malloc and frees it after the step. With pages
of 4 KiB, page faults take a third of a small model's step. glibc requests pages
of 2 MiB if a tunable is set when the process starts.
"""

from collections.abc import Mapping
import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"


def environment(variables: Mapping[str, str]) -> dict[str, str]:
  """Return environment variables with huge pages requested.

  A value set by the user is kept. C libraries other than glibc ignore it.
  """
  tunables = variables.get(_VARIABLE, "")
  if _TUNABLE not in tunables:
    tunables = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
  return {**variables, _VARIABLE: tunables}


def restart_with(module: str) -> None:
  """Restart `python -m module`, in the same process, if it lacks huge pages.

  Called first, since only the command line is kept. Does nothing in other
  programs, such as a notebook that runs the module.
  """
  wanted = environment(os.environ)
  mine = sys.executable and module in sys.orig_argv
  if sys.platform == "linux" and mine and wanted != dict(os.environ):
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, wanted)
