"""The exception for errors that the user can correct."""

from collections.abc import Iterable
import difflib
import re

_TENSORSTORES_NOTES = re.compile(
  r"\s*\[(tensorstore_spec|source locations)='.*?'\]"
)

# Raised by parsing a damaged JSON file or using its values.
DAMAGED_JSON = (
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,  # Thousands of nested brackets.
  TypeError,
  ValueError,
)


class UserError(Exception):
  """An error in a flag, a file or the state of the machine.

  The message is one line, `<file or key>: <problem>; <fix>`. Commands print it
  without a traceback and exit with a non-zero code. Any function that reads a
  file, a flag or a config may raise it.
  """


def nearest(name: str, valid: Iterable[str]) -> str:
  """Return a hint such as 'did you mean LN? valid: LN, BN, GN'.

  A long list of valid names is omitted if one is close.
  """
  valid = list(valid)
  lower = {v.lower(): v for v in valid}
  close = [
    lower[v]
    for v in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
  ]
  hint = f"did you mean {' or '.join(close)}?" if close else ""
  if hint and len(valid) > 12:
    return hint
  return f"{hint} valid: {', '.join(valid)}".strip()


def brief(error: Exception) -> str:
  """Return an exception's message as one line of at most 305 characters.

  Libraries put the cause last, except TensorStore, whose request is removed.
  """
  text = " ".join(str(error).split()) or type(error).__name__
  text = _TENSORSTORES_NOTES.sub("", text)
  return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"
