"""The accelerator that programs are compiled for.

By default the first device of this process. `compiling_for` overrides it, to
compile programs for absent hardware.
"""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import re

import jax

from rescalevit_jax import errors


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Properties that the choice of an implementation depends on."""

  platform: str  # cpu, gpu or tpu.
  compute_capability: tuple[int, int] = (0, 0)  # Of an NVIDIA GPU.


_described: contextvars.ContextVar[Accelerator | None] = contextvars.ContextVar(
  "described", default=None
)


def platform() -> str:
  """Return the platform that programs are compiled for: cpu, gpu or tpu."""
  return current().platform


def current() -> Accelerator:
  """Return the accelerator that programs are compiled for."""
  if described := _described.get():
    return described
  capability = getattr(jax.devices()[0], "compute_capability", None)
  # AMD's are of another form, such as gfx90a.
  found = re.fullmatch(r"(\d+)\.(\d+)", str(capability))
  major, minor = map(int, found.groups()) if found else (0, 0)
  return Accelerator(jax.default_backend(), (major, minor))


@contextlib.contextmanager
def compiling_for(described: Accelerator) -> Iterator[None]:
  """Trace for an accelerator that this process does not have.

  JAX's caches do not depend on it, so they are cleared before and after.
  """
  token = _described.set(described)
  jax.clear_caches()
  try:
    yield
  finally:
    _described.reset(token)
    jax.clear_caches()


def start_problem() -> str | None:
  """Return why JAX cannot start a device, None if it can."""
  try:
    jax.devices()
  except Exception as e:  # An AssertionError if a plugin is missing.
    platforms = jax.config.values["jax_platforms"]
    return (
      f"JAX_PLATFORMS ({platforms}): no such device"
      f" ({errors.brief(e) or type(e).__name__}); unset it, or set it to cpu"
    )
  return None
