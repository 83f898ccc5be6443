"""The log on the terminal."""

import logging
import sys

from absl import logging as absl_logging

from rescalevit_jax.runtime import compat


def log_to_stderr() -> None:
  """Show this package's log on stderr, with the time of day.

  The logs of libraries are hidden: orbax writes some twenty lines for each
  checkpoint, and errors arrive as exceptions.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisablehook
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(
    logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
  )
  logger = logging.getLogger("rescalevit_jax")
  logger.handlers = [handler]
  logger.setLevel(logging.INFO)
  logger.propagate = False


def _unraisablehook(unraisable):
  if not compat.is_abandoned_write(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def duration(seconds: float) -> str:
  """Return '42 s', '12 min', '3 h 20 min' or '4 d 2 h'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days} d {hours} h"
  if hours:
    return f"{hours} h {minutes} min"
  if minutes >= 10:
    return f"{minutes} min"
  if minutes:
    return f"{minutes} min {seconds} s"
  return f"{seconds} s"
