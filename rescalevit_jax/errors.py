"""The one exception for mistakes that the person at the keyboard can mend."""

from collections.abc import Iterable
import difflib


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
