"""What all programs share: a mistake is one line and an exit code, no more."""

from collections.abc import Callable
import os
import sys

import jax

from rescalevit_jax import errors
from rescalevit_jax.runtime import cache
from rescalevit_jax.runtime import cuda_plugin


def run(body: Callable[[], int | None]) -> int:
  """Runs a program.

  Args:
    body: does the work; returns the exit code, or None for 0.

  Returns:
    The exit code: `body`'s, 1 after a mistake, 130 after Ctrl-C.
  """
  if hasattr(sys.stdout, "reconfigure"):
    # Names of files may have characters that the terminal has not.
    sys.stdout.reconfigure(errors="backslashreplace")
  cuda_plugin.hide_if_compile_only()
  cache.enable_compilation_cache()
  try:
    return body() or 0
  except BrokenPipeError:
    # Nobody reads on, as after `| head`; at the exit Python flushes once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (errors.UserError, OSError) as e:
    return fail(str(e))
  except jax.errors.JaxRuntimeError as e:
    full = "RESOURCE_EXHAUSTED" in str(e)
    return fail(str(e)[:300] + ": try a smaller --batch" * full)
  except KeyboardInterrupt:
    return fail("interrupted", 130)


def fail(message: str, code: int = 1) -> int:
  """Prints an error as one line; returns the exit code."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  return code
