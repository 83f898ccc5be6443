"""Settings of glibc's malloc for training on a CPU.

XLA allocates a step's memory by malloc and frees it after the step. By default,
glibc returns this memory to the system, and page faults take a third of a small
model's step.
"""

from collections.abc import Mapping
import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLES = {
  "glibc.malloc.hugetlb": 1,  # Pages of 2 MiB.
  # Keep freed memory. Only the main arena can: others map large blocks.
  "glibc.malloc.arena_max": 1,
  "glibc.malloc.mmap_max": 0,
  "glibc.malloc.trim_threshold": 2**40,
}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
  """Return environment variables that contain the settings.

  Settings of the user are kept. C libraries other than glibc ignore them.
  """
  found = [t for t in variables.get(_VARIABLE, "").split(":") if t]
  names = {tunable.split("=")[0] for tunable in found}
  found += [f"{k}={v}" for k, v in _TUNABLES.items() if k not in names]
  return {**variables, _VARIABLE: ":".join(found)}


def restart_with(module: str) -> None:
  """Restart `python -m module`, in the same process, if it lacks the settings.

  Called first, since only the command line is kept. Does nothing in other
  programs, such as a notebook that runs the module.
  """
  wanted = environment(os.environ)
  mine = sys.executable and module in sys.orig_argv
  if sys.platform == "linux" and mine and wanted != dict(os.environ):
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, wanted)
