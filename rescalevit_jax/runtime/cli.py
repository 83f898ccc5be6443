"""Run a command: a user's mistake becomes one line and an exit code."""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import os
import pathlib
import sys
from typing import Any

import jax

from rescalevit_jax import errors
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.runtime import cache
from rescalevit_jax.runtime import compat
from rescalevit_jax.runtime import cuda_plugin

# Flags of local folders and files.
_PATH_FLAGS = (
  "--workdir",
  "--runs_dir",
  "--output",
  "--tfds_data_dir",
  "--npz",
  "--image",
  "--config.pretrained_path",
)


def arguments(argv: Sequence[str] | None = None) -> list[str]:
  """Return arguments, by default this process's, with `~` expanded.

  Ends the process with code 2 if a path is a URL, such as gs://.
  """
  open_closed_streams()
  expanded = []
  for word in sys.argv[1:] if argv is None else argv:
    flag, equals, value = word.partition("=")
    if not flag.startswith("-"):
      flag, equals, value = "", "", word
    if "://" in value and flag in ("", *_PATH_FLAGS):
      sys.exit(
        fail(
          f"{flag or 'arguments'}: {value} is a URL; give a path on this"
          " machine, such as in a mounted bucket",
          code=2,
        )
      )
    expanded.append(flag + equals + os.path.expanduser(value))
  return expanded


def parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
  """Return a parser whose help is a docstring with its line breaks."""
  return argparse.ArgumentParser(
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    **options,
  )


def positive(text: str) -> int:
  """Parse the value of a flag that is a number above 0, for argparse."""
  return _integer(text, 1, "a whole number above 0")


def index(text: str) -> int:
  """Parse the value of a flag that is an index, for argparse."""
  return _integer(text, 0, "an integer >= 0")


def _integer(text, least, expected):
  """Parse an integer as config keys are parsed; 1_000 is valid."""
  with contextlib.suppress(ValueError):
    if (number := int(text)) >= least:
      return number
  raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


def check_output(path: str | os.PathLike[str]) -> None:
  """Raise UserError unless the file of --output can be written."""
  path = pathlib.Path(path)
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise errors.UserError(
      f"--output: {path} cannot be written; choose a file in a folder that"
      " exists"
    )


def run(body: Callable[[], int | None]) -> int:
  """Run a command; return the exit code.

  The exit code is the result of `body`, 1 after an error, or 130 after Ctrl-C.
  """
  prepare()
  if hasattr(sys.stdout, "reconfigure"):
    # File names may have characters that the terminal cannot show.
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    code = body() or 0
    sys.stdout.flush()
    return code
  except BrokenPipeError:
    return discard_output()
  except (errors.UserError, OSError) as e:
    return fail(str(e))
  except jax.errors.JaxRuntimeError as e:
    full = compat.is_out_of_memory(e)
    return fail(str(e)[:300] + ": try a smaller batch" * full)
  except (AssertionError, RuntimeError) as e:
    if problem := accelerator.start_problem():
      return fail(problem)
    raise e
  except KeyboardInterrupt:
    return fail("interrupted", 130)


def prepare() -> None:
  """Set up the process of a command, before devices are used."""
  open_closed_streams()
  cuda_plugin.hide_if_compile_only()
  cache.enable_compilation_cache()
  # A notebook's backend need not exist here; pictures are written to files.
  os.environ["MPLBACKEND"] = "agg"


def open_closed_streams() -> None:
  """Open /dev/null as each standard stream that is closed, as by `>&-`.

  Each open takes the lowest free descriptor, so the order is that of their
  numbers. Otherwise a file could be opened as descriptor 1 or 2, and libraries
  would print into it.
  """
  for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def discard_output() -> int:
  """Redirect stdout to /dev/null after its reader has exited; return the code.

  Python flushes stdout again at exit.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 1


def fail(message: str, code: int = 1) -> int:
  """Print an error as one line; return the exit code."""
  with contextlib.suppress(OSError):  # The reader of stderr has exited.
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  return code
