"""Write tables and a page that compare all runs in a folder.

python -m rescalevit_jax.report runs

Writes report.md and report.csv (a row per recipe, over all its seeds), runs.csv
(a row per run) and report.html (the table with curves, diagnostics and
attention maps, in one file that works offline).
"""

from collections.abc import Sequence

from rescalevit_jax.report import output
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal


def main(argv: Sequence[str] | None = None) -> int:
  """Write the report; return the exit code."""
  parser = cli.parser(__doc__, prog="python -m rescalevit_jax.report")
  parser.add_argument("runs_dir", metavar="RUNS_DIR", help="folder of runs")
  parser.add_argument(
    "--output", metavar="DIR", help="output folder (default: RUNS_DIR)"
  )
  parser.add_argument(
    "--index",
    type=cli.index,
    default=0,
    metavar="N",
    help="index of the test image for the attention maps (default: 0)",
  )
  parser.add_argument(
    "--no_attention",
    action="store_true",
    help="omit the attention maps, which load every model",
  )
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _run(args):
  table, paths = output.write(
    args.runs_dir,
    args.output or args.runs_dir,
    None if args.no_attention else args.index,
  )
  print(table)
  for path in paths:
    print(path)
