"""The one exception for mistakes that the person at the keyboard can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake in a flag, a file or the machine's state.

  The message is one line: what was wrong, where, what to do. Programs print it
  without a traceback and exit with a code other than 0.
  """


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint such as 'did you mean LN? valid: BN, GN, LN'."""
  valid = list(valid)
  close = difflib.get_close_matches(name, valid, n=3, cutoff=0.4)
  if not close:  # get_close_matches is case-sensitive.
    close = [v for v in valid if v.lower() == name.lower()]
  hint = f"did you mean {' or '.join(close)}? " if close else ""
  return f"{hint}valid: {', '.join(valid)}"
