"""Write Markdown."""

from collections.abc import Iterable
import html

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
