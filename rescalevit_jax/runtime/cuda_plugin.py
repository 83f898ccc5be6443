"""JAX's CUDA plugin on machines without a GPU: to compile, not to run.

The wheel jax-cuda12-pjrt alone compiles for GPUs (`benchmark.gpu_compile`). JAX
initializes every plugin that it finds, and without CUDA this one logs a
traceback at every start. So programs hide it, unless jax-cuda12-plugin is
installed as well.
"""

from collections.abc import Iterator
import contextlib
import importlib
import importlib.util
import logging
import sys
import types

import jax
from jax.experimental import topologies

from rescalevit_jax import errors

# JAX imports this module and calls its `initialize` when it starts.
_PLUGIN = "jax_plugins.xla_cuda12"
_NVCC = "nvidia.cuda_nvcc"


class _NoPlugin(types.ModuleType):
  """Replaces the plugin; JAX registers nothing."""

  def initialize(self) -> None:
    """Do nothing."""


def can_compile() -> bool:
  """Return whether the wheels that compile for GPUs are installed."""
  return all(map(_is_installed, (_PLUGIN, _NVCC)))


def hide_if_compile_only() -> None:
  """Hide a compile-only CUDA plugin, before JAX starts its devices."""
  if _is_installed(_PLUGIN) and not _is_installed("jax_cuda12_plugin"):
    sys.modules.setdefault(_PLUGIN, _NoPlugin(_PLUGIN))


def compile_only_devices(description: str, count: int) -> list[jax.Device]:
  """Return the GPUs of one host to compile for, which need not exist.

  `description` is XLA's target config, as text. Called before JAX starts its
  devices, or with a plugin that is not hidden.

  Raises:
    UserError: the wheels are missing.
  """
  if not can_compile():
    raise errors.UserError(
      "--compile_for: the compiler for GPUs is not installed; run"
      f" pip install jax-cuda12-pjrt=={jax.lib.__version__}"
      " nvidia-cuda-nvcc-cu12"
    )
  if isinstance(sys.modules.get(_PLUGIN), _NoPlugin):
    del sys.modules[_PLUGIN]
  # It warns that jax-cuda12-plugin is missing.
  logging.getLogger(_PLUGIN).setLevel(logging.ERROR)
  return topologies.get_topology_desc(
    platform="cuda", target_config=description, topology=f"1x1x{count}"
  ).devices


def compiler_options() -> dict[str, str]:
  """Return XLA's options to compile with the wheels' assembler.

  XLA may find another one on this machine first, too new for an old GPU.
  """
  nvcc = importlib.import_module(_NVCC)
  return {"xla_gpu_cuda_data_dir": nvcc.__path__[0]}


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Compile without JAX's cache on disk, which cannot read these programs."""
  key = "jax_persistent_cache_min_compile_time_secs"
  seconds = jax.config.values[key]
  jax.config.update(key, float("inf"))
  try:
    yield
  finally:
    jax.config.update(key, seconds)


def _is_installed(module: str) -> bool:
  if module in sys.modules:
    return True
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # The parent package is missing.
    return False
