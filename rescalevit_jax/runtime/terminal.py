"""The log on the terminal."""

import logging
import sys

from absl import logging as absl_logging


def log_to_stderr() -> None:
  """Shows this package's messages, one line each, with the time of day.

  The libraries' are not shown: orbax writes some twenty for a checkpoint, and
  what goes wrong comes as an exception.
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
  # Tensorstore's threads report here that nobody waits for them any more once
  # another one of them has failed.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def duration(seconds: float) -> str:
  """Returns '42 s', '12 min', '3 h 20 min' or '4 d 2 h'."""
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
