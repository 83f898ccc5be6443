r"""Draws the diagnostics of runs, a picture each, by depth and time.

python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a \
    --output=a.png

A run has diagnostics if it was trained with --config.diagnostics_every=100, or
another number of steps.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Draws diagnostics; returns the exit code."""
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
    help="the picture of one run, .png or .svg; repeatable, default:"
    " diagnostics.png and diagnostics.svg in each run's folder",
  )
  args = parser.parse_args(argv)
  return cli.run(lambda: _run(args))


def _run(args):
  for path in args.output or ():
    plots.check_suffix(path)
  found = run_reader.find_each(args.workdir)
  diagnosed = [r for r in found if diagnostics_plots.is_diagnosed(r)]
  if not diagnosed:
    raise errors.UserError(
      "no run with diagnostics; train with --config.diagnostics_every=100"
    )
  if args.output and len(diagnosed) > 1:
    raise errors.UserError(
      f"--output is for one run, but there are {len(diagnosed)}; leave it out,"
      " and each gets a picture in its folder"
    )
  for run in diagnosed:
    figure = diagnostics_plots.draw(run, run.workdir.resolve().name)
    names = (f"diagnostics.{kind}" for kind in ("png", "svg"))
    for path in args.output or map(run.workdir.joinpath, names):
      plots.save(figure, path)
      print(path)


if __name__ == "__main__":
  sys.exit(main())
