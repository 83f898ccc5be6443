"""Writes the tables and the page that compare all runs in a folder.

python -m rescalevit_jax.report runs

Writes report.md and report.csv (a row for all seeds of a recipe), runs.csv (a
row a run) and report.html (the same with curves, diagnostics and attention
maps; it needs no network).
"""

import argparse
import collections
from collections.abc import Iterable, Sequence
import logging
import os
import pathlib

from rescalevit_jax.analysis import reference_results
from rescalevit_jax.report import page
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import markdown as markdown_lib
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the report; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m rescalevit_jax.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("runs_dir", metavar="RUNS_DIR", help="folder of runs")
  parser.add_argument(
    "--output", metavar="DIR", help="where to write; default: RUNS_DIR"
  )
  parser.add_argument(
    "--published",
    metavar="CSV",
    help="curves that RescaleViT published, drawn faintly beside ours",
  )
  parser.add_argument(
    "--index",
    type=_index,
    default=0,
    metavar="N",
    help="the test image of the attention maps; default: 0",
  )
  parser.add_argument(
    "--no_attention",
    action="store_true",
    help="leave out the attention maps: no model is loaded",
  )
  args = parser.parse_args(argv)
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _run(args):
  curves = (
    reference_results.read_curves(args.published) if args.published else {}
  )
  table, paths = write(
    args.runs_dir,
    args.output or args.runs_dir,
    curves,
    None if args.no_attention else args.index,
  )
  print(table)
  for path in paths:
    print(path)


def write(
  runs_dir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  curves: dict[reference_results.Key, reference_results.Curve],
  index: int | None,
) -> tuple[str, list[pathlib.Path]]:
  """Writes report.md, report.csv, runs.csv and report.html.

  Args:
    runs_dir: the folder of the runs.
    output: the folder to write to; made if it is not there.
    curves: of published runs.
    index: of the test image of the attention maps; None: no maps.

  Returns:
    The table in Markdown and the files written.

  Raises:
    UserError: there is no such folder, or no run in it.
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
  notes = describe(study)
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


def describe(study: run_groups.Study) -> list[str]:
  """Returns what a reader of the table has to know, a sentence or two each."""
  finished = study.finished
  others = {
    "unfinished": study.unfinished,
    "not begun": study.not_begun,
    "damaged": study.damaged,
  }
  notes = [
    f"{_count(len(finished), 'finished run')} of"
    f" {_count(len(study.groups), 'recipe')}; "
    + ", ".join(f"{len(runs)} {what}" for what, runs in others.items())
    + "."
  ]
  if not finished:
    return notes
  notes += [
    "Accuracy is that on the test split: mean ± standard deviation (n − 1) of"
    " n runs that differ only in their seed; a single run has no deviation.",
    "Best is the highest accuracy of all evaluations of a run: it peeks at the"
    " test set. Last is the accuracy after the last step.",
    "Minutes are those of the whole run, compilation and evaluations included;"
    " images/s those of training alone.",
  ]
  keys = {reference_results.match(group[0].config) for group in study.groups}
  if keys & reference_results.FIGURES.keys():
    notes.append(
      "Published are the figures in the logs of RescaleViT: one run each, the"
      " best of 200 evaluations, one RTX 3090, fp16. Difference: our mean minus"
      " the published figure, in percentage points. A run from MODEL.npz is"
      " taken to start from Google's ImageNet-21k weights, as RescaleViT's did."
    )
  for group in study.groups:
    seeds = [run.config.seed for run in group]
    if len(set(seeds)) < len(seeds):
      names = ", ".join(study.name(run) for run in group)
      notes.append(f"Runs with one seed, counted each by itself: {names}.")
  notes.append(f"Hardware: {_tally(map(tables.devices, finished))}.")
  notes.append(f"Software: {_tally(map(tables.versions, finished))}.")
  return notes


def _markdown(study, table, notes):
  lines = ["# Comparison of runs", ""]
  lines += [f"- {markdown_lib.escape(note)}" for note in notes]
  lines += ["", table]
  for title, items in tables.left_out(study):
    lines += [f"## {title}", ""]
    lines += [f"- {markdown_lib.escape(item)}" for item in items]
    lines += [""]
  return "\n".join(lines).rstrip() + "\n"


def _tally(descriptions: Iterable[str]) -> str:
  """Returns 'A (3 runs); B (1 run)', or 'A' where all are the same."""
  counts = collections.Counter(descriptions)
  if len(counts) == 1:
    return next(iter(counts))
  return "; ".join(f"{what} ({_count(n, 'run')})" for what, n in counts.items())


def _count(n, noun):
  return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _index(text):
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
  return int(text)
