"""Tables in LaTeX, for the package booktabs."""

from collections.abc import Iterable

# Characters with a meaning in LaTeX.
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
  escapes = str.maketrans(_ESCAPES)
  escaped = [" ".join(cell.split()).translate(escapes) for cell in cells]
  return " & ".join(escaped) + r" \\"
