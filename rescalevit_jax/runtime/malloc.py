"""Settings of glibc's malloc for fast training on a CPU.

XLA allocates a step's memory by malloc and frees it after the step. By default,
glibc returns it to the system. The page faults of new memory then take a third
of a small model's step.
"""

from collections.abc import Mapping
import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_SETTINGS = {
  "hugetlb": 1,  # Pages of 2 MiB.
  # Keep freed memory. Other arenas than the main one unmap large blocks.
  "arena_max": 1,
  "mmap_max": 0,
  "trim_threshold": 2**40,
}
_RESTARTED = "_RESCALEVIT_JAX_RESTARTED"


def environment(variables: Mapping[str, str]) -> dict[str, str]:
  """Return environment variables that contain the settings.

  Settings that they contain already are kept, also as MALLOC_ARENA_MAX and the
  like. C libraries other than glibc ignore GLIBC_TUNABLES.
  """
  tunables = [t for t in variables.get(_VARIABLE, "").split(":") if t]
  found = {tunable.split("=")[0] for tunable in tunables}
  for name, value in _SETTINGS.items():
    variable = f"MALLOC_{name.upper()}"
    if not {variable, f"{variable}_"} & variables.keys():
      if f"glibc.malloc.{name}" not in found:
        tunables.append(f"glibc.malloc.{name}={value}")
  return {**variables, _VARIABLE: ":".join(tunables)}


def restart_with(module: str) -> None:
  """Restart `python -m module`, in the same process, if it lacks the settings.

  Call it first: all state but the command line is lost. It does nothing in
  other programs, such as a notebook that runs the module.
  """
  mine = sys.executable and {module, f"-m{module}"} & set(sys.orig_argv)
  pid = str(os.getpid())  # Kept by a restart.
  wanted = environment(os.environ)
  if (
    sys.platform == "linux"
    and mine
    and wanted != dict(os.environ)
    and os.environ.get(_RESTARTED) != pid
  ):
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, {**wanted, _RESTARTED: pid})
