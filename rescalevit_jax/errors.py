"""The one exception for mistakes that the person at the keyboard can mend."""

from collections.abc import Iterable
import difflib
import re
import traceback

_TENSORSTORES_NOTES = re.compile(
  r"\s*\[(tensorstore_spec|source locations)='.*?'\]"
)


class UserError(Exception):
  """A mistake in a flag, a file or the machine's state.

  The message is one line: what was wrong, where, what to do. Programs print it
  without a traceback and exit with a code other than 0.
  """


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint such as 'did you mean LN? valid: LN, BN, GN'.

  A long list of valid names is left out where there is a near one.
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
  """Returns an exception's message as one line of moderate length.

  Libraries put their own words and long paths first, and the cause last; but
  for TensorStore, which adds what it was asked to do.
  """
  text = " ".join(str(error).split()) or type(error).__name__
  text = _TENSORSTORES_NOTES.sub("", text)
  return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def explain(error: Exception, expected: tuple[type[Exception], ...]) -> str:
  """Returns what to say of an exception that a config file has led to.

  Args:
    error: it.
    expected: types whose messages are for people; of others, the type and the
      place are told as well.
  """
  message = str(error)
  if "Traceback" in message:  # ml_collections quotes a whole one.
    message = message.splitlines()[-1]
  if isinstance(error, expected):
    return message
  frame = traceback.extract_tb(error.__traceback__)[-1]
  kind = type(error).__name__
  return f"{message} ({kind}, {frame.filename}:{frame.lineno})"
