r"""Draws accuracy and loss over steps, of one run or of several.

python -m rescalevit_jax.analysis.plot_curves --workdir=runs/a \
    --workdir=runs/b --output=a.png
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Draws curves; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workdir",
    action="append",
    required=True,
    help="a run's folder, or one with several runs; repeatable",
  )
  parser.add_argument(
    "--output",
    action="append",
    type=pathlib.Path,
    help="the picture, .png or .svg; repeatable, default: curves.png and"
    " curves.svg",
  )
  parser.add_argument(
    "--published",
    help="CSV of published curves, drawn faint beside runs of the same recipe;"
    " columns: dataset, model, norm, pretrained, step, valid_loss,"
    " valid_accuracy",
  )
  args = parser.parse_args(argv)
  return cli.run(lambda: _run(args))


def _run(args):
  outputs = args.output or [pathlib.Path(f"curves.{x}") for x in ("png", "svg")]
  for path in outputs:
    plots.check_suffix(path)
  found = run_reader.find_each(args.workdir)
  if not found:
    raise errors.UserError("no run to draw: none can be read")
  curves = {}
  if args.published is not None:
    curves = reference_results.read_curves(args.published)
  figure = plots.curves(found, curves)
  for path in outputs:
    plots.save(figure, path)
    print(f"{path}: {len(found)} run{'s' * (len(found) > 1)}")


if __name__ == "__main__":
  sys.exit(main())
