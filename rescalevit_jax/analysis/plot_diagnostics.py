r"""Draw the diagnostics of runs over depth and time, a picture per run.

python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a \
    --output=a.png

A run records diagnostics with --config.diagnostics_every=100, or another
number of steps.
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

_NAMES = ("diagnostics.png", "diagnostics.svg")


def main(argv: Sequence[str] | None = None) -> int:
  """Draw diagnostics; return the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workdir",
    action="append",
    required=True,
    help="folder of a run, or of several runs; repeatable",
  )
  parser.add_argument(
    "--output",
    action="append",
    type=pathlib.Path,
    help="the picture of a single run, .png or .svg; repeatable (default:"
    " diagnostics.png and diagnostics.svg in each run's folder)",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: plot(args.workdir, args.output))


def plot(
  workdirs: Sequence[str | pathlib.Path],
  outputs: Sequence[pathlib.Path] | None = None,
) -> None:
  """Draw the diagnostics of all runs in some folders and write the pictures.

  Args:
    workdirs: folders of a run, or of several.
    outputs: paths of the pictures of a single run, .png or .svg; None for
      diagnostics.png and diagnostics.svg in each run's folder.

  Raises:
    UserError: a file cannot be read or written, no run has diagnostics, or
      `outputs` is given for several runs.
  """
  for path in outputs or ():
    plots.check_suffix(path)
  runs = run_reader.find_each(workdirs)
  diagnosed = [run for run in runs if diagnostics_plots.is_diagnosed(run)]
  if not diagnosed:
    raise errors.UserError(
      "no run with diagnostics; train with --config.diagnostics_every=100"
    )
  if outputs and len(diagnosed) > 1:
    raise errors.UserError(
      f"--output: names one picture for {len(diagnosed)} runs; leave it out to"
      " write a picture into each run's folder"
    )
  for run in diagnosed:
    figure = diagnostics_plots.draw(run, run.workdir.resolve().name)
    for path in outputs or map(run.workdir.joinpath, _NAMES):
      plots.save(figure, path)
      print(path)


if __name__ == "__main__":
  sys.exit(main())
