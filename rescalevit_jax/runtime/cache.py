"""The user's cache folder, and the cache of compiled programs in it.

`${XDG_CACHE_HOME:-~/.cache}/rescalevit_jax/compiled-MACHINE/`, through JAX's
persistent compilation cache. Everything in there can be deleted at any time.
"""

import hashlib
import os
import pathlib
import platform

import jax

_MIN_SECONDS = 0.05  # Shorter compilations are not cached.


def root() -> pathlib.Path:
  """Return the cache folder of this package."""
  caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(caches, "rescalevit_jax")


def enable_compilation_cache() -> None:
  """Enable the compilation cache, unless JAX_COMPILATION_CACHE_DIR is set.

  Call it before the first compilation. JAX_ENABLE_COMPILATION_CACHE=false
  disables it.
  """
  if jax.config.values["jax_compilation_cache_dir"]:
    return
  folder = root() / f"compiled-{_machine()}"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def _machine() -> str:
  """Return a name for this kind of processor.

  Programs compiled for one kind may fail on another, and machines of a cluster
  often share a home folder.
  """
  text = f"{platform.system()} {platform.machine()} {platform.processor()}"
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    kinds = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text(errors="replace").splitlines()
    text += "".join(sorted({x for x in lines if x.startswith(kinds)}))
  return hashlib.sha256(text.encode()).hexdigest()[:12]
