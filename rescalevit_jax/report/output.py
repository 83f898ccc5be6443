"""Write the files of the report."""

import logging
import os
import pathlib

from rescalevit_jax.analysis import reference_results
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
  curves: dict[reference_results.Key, reference_results.Curve],
  index: int | None,
) -> tuple[str, list[pathlib.Path]]:
  """Write report.md, report.csv, runs.csv and report.html.

  Args:
    runs_dir: folder of the runs.
    output: output folder; created if missing.
    curves: published curves.
    index: index of the test image for the attention maps; None for no maps.

  Returns:
    The Markdown table and the paths of the files.

  Raises:
    UserError: the folder is missing or contains no run.
  """
  study = run_groups.collect(runs_dir)
  for line in study.damaged:
    _log.warning("left out: %s", line)
  for line in study.not_begun:
    _log.warning("left out: not begun: %s", line)
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  columns, rows = tables.columns(study), tables.rows(study)
  table = tables.markdown(columns, rows) if rows else "No finished run.\n"
  notes = notes_lib.describe(study)
  files = {
    "report.md": lambda: _markdown(study, table, notes),
    "report.csv": lambda: tables.to_csv(rows),
    "runs.csv": lambda: tables.to_csv(tables.run_rows(study)),
    "report.html": lambda: page.render(
      study, columns, rows, notes, curves, index
    ),
  }
  for name, text in files.items():
    atomic_file.write(output / name, text())
  return table, [output / name for name in files]


def _markdown(study, table, notes):
  lines = ["# Comparison of runs", "", *_items(notes), "", table]
  for title, items in tables.left_out(study):
    lines += [f"## {title}", "", *_items(items), ""]
  return "\n".join(lines).rstrip() + "\n"


def _items(lines):
  return [f"- {markdown.escape(line)}" for line in lines]
