"""Tables in LaTeX, for the package booktabs."""

from collections.abc import Iterable

_ESCAPES = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "±": r"$\pm$",
  "−": "$-$",
  "–": "--",
  **{character: f"\\{character}" for character in "&%$#_{}"},
}


def table(
  alignment: str, headings: Iterable[str], rows: Iterable[Iterable[str]]
) -> str:
  """Return a tabular environment; see `markdown.table` for the arguments."""
  lines = [
    f"\\begin{{tabular}}{{{alignment}}}",
    "\\toprule",
    _row(headings),
    "\\midrule",
    *map(_row, rows),
    "\\bottomrule",
    "\\end{tabular}",
  ]
  return "".join(f"{line}\n" for line in lines)


def _row(cells):
  return " & ".join(map(escape, cells)) + r" \\"


def escape(text: str) -> str:
  """Escape the characters that have a meaning in LaTeX."""
  return "".join(_ESCAPES.get(x, x) for x in " ".join(text.split()))
