"""Write Markdown."""

from collections.abc import Callable, Iterable, Mapping
import html
from typing import Any

NOTHING = "–"


def escape(text: str) -> str:
  """Return the text on one line, with HTML and Markdown syntax escaped."""
  text = html.escape(" ".join(text.split()), quote=False)
  for character in "\\|`*":
    text = text.replace(character, f"\\{character}")
  return text


def table(
  alignment: str, headings: Iterable[str], rows: Iterable[Iterable[str]]
) -> str:
  """Return a table.

  Args:
    alignment: a letter per column: 'l' for left, 'r' for right.
    headings: heading of each column.
    rows: cells of each row; they are escaped.
  """
  rules = [{"l": "---", "r": "--:"}[letter] for letter in alignment]
  escaped = [[escape(cell) for cell in row] for row in rows]
  lines = [[escape(heading) for heading in headings], rules, *escaped]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_of(
  alignment: str,
  columns: Mapping[str, Callable[[Any], str]],
  items: Iterable[Any],
) -> str:
  """Return a table of items.

  `columns` maps each heading to a function that returns an item's cell.
  """
  rows = [[cell(item) for cell in columns.values()] for item in items]
  return table(alignment, columns, rows)


def number(
  key: str, text: str = "{:.2f}", factor: float = 1
) -> Callable[[Mapping[str, Any]], str]:
  """Return a function from a mapping to the cell of a value, '' if missing."""
  return lambda item: text.format(factor * item[key]) if key in item else ""
