"""Write the files of the report."""

import logging
import os
import pathlib

from rescalevit_jax.report import differences
from rescalevit_jax.report import latex
from rescalevit_jax.report import notes as notes_lib
from rescalevit_jax.report import page
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import markdown

_log = logging.getLogger(__name__)


def write(
  runs_dir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  index: int | None,
) -> tuple[str, list[pathlib.Path]]:
  """Write report.md, .csv, .tex and .html, and runs.csv.

  Args:
    runs_dir: folder of the runs.
    output: output folder; created if missing.
    index: index of the test image for the attention maps; None for no maps.

  Returns:
    The Markdown table and the paths of the files.
  """
  study = run_groups.collect(runs_dir)
  for line in study.damaged:
    _log.warning("left out: %s", line)
  for line in study.not_begun:
    _log.warning("left out: not begun: %s", line)
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  rows = tables.rows(study)
  cells = tables.cells(tables.columns(study), rows)
  table = markdown.table(*cells) if rows else "No finished run.\n"
  compared = differences.table(study)
  files = {
    "report.md": lambda: _markdown(study, table, compared),
    "report.csv": lambda: tables.to_csv(rows),
    "report.tex": lambda: _latex(cells, compared),
    "runs.csv": lambda: tables.to_csv(tables.run_rows(study)),
    "report.html": lambda: page.render(study, index),
  }
  for name, text in files.items():
    atomic_file.write(output / name, text())
  return table, [output / name for name in files]


def _latex(cells, compared):
  parts = ["% Needs the package booktabs.\n", latex.table(*cells)]
  if compared[-1]:
    parts.append(latex.table(*compared))
  return "\n".join(parts)


def _markdown(study, table, compared):
  notes = _items(notes_lib.describe(study))
  lines = ["# Comparison of runs", "", *notes, "", table]
  if compared[-1]:
    lines += ["## Differences of the last accuracy", "", differences.NOTE, ""]
    lines += [markdown.table(*compared)]
  for title, items in tables.left_out(study):
    lines += [f"## {title}", "", *_items(items), ""]
  return "\n".join(lines).rstrip() + "\n"


def _items(lines):
  return [f"- {markdown.escape(line)}" for line in lines]
