"""Run a command: a user's mistake becomes one line and an exit code."""

from collections.abc import Callable
import os
import sys

import jax

from rescalevit_jax import errors
from rescalevit_jax.runtime import cache
from rescalevit_jax.runtime import compat
from rescalevit_jax.runtime import cuda_plugin


def run(body: Callable[[], int | None]) -> int:
  """Run a command.

  Args:
    body: does the work; returns the exit code, or None for 0.

  Returns:
    The exit code: from `body`, 1 after an error, 130 after Ctrl-C.
  """
  if hasattr(sys.stdout, "reconfigure"):
    # File names may have characters that the terminal cannot show.
    sys.stdout.reconfigure(errors="backslashreplace")
  cuda_plugin.hide_if_compile_only()
  cache.enable_compilation_cache()
  try:
    return body() or 0
  except BrokenPipeError:
    # The reader has gone, as in `| head`; Python flushes again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (errors.UserError, OSError) as e:
    return fail(str(e))
  except jax.errors.JaxRuntimeError as e:
    full = compat.is_out_of_memory(e)
    return fail(str(e)[:300] + ": try a smaller --batch" * full)
  except KeyboardInterrupt:
    return fail("interrupted", 130)


def fail(message: str, code: int = 1) -> int:
  """Print an error as one line; return the exit code."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  return code
