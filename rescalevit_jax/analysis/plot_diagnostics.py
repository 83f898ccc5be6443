r"""Draw the diagnostics of runs over depth and time, a picture per run.

python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs
python -m rescalevit_jax.analysis.plot_diagnostics --workdir=runs/a \
    --output=a.png

A run records diagnostics with --config.diagnostics_every=100, or another
number of steps.
"""

from collections.abc import Sequence
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import cli

_NAMES = ("diagnostics.png", "diagnostics.svg")


def main(argv: Sequence[str] | None = None) -> int:
  """Draw diagnostics; return the exit code."""
  parser = cli.parser(__doc__)
  plots.add_flags(
    parser,
    "diagnostics.png and diagnostics.svg in each run's folder",
    scope=" of a single run",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: _run(args.workdir, args.output))


def _run(workdirs, outputs):
  for path in outputs:
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
