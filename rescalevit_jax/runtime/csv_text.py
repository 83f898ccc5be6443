"""Write CSV."""

from collections.abc import Iterable
import csv
import io
from typing import Any


def table(rows: Iterable[Iterable[Any]]) -> str:
  """Return rows as CSV. None becomes an empty cell."""
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  return text.getvalue()
