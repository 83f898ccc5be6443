r"""Draw accuracy and loss of one or more runs over training steps.

python -m rescalevit_jax.analysis.plot_curves --workdir=runs/a \
    --workdir=runs/b --output=a.png
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import cli

_OUTPUTS = (pathlib.Path("curves.png"), pathlib.Path("curves.svg"))


def main(argv: Sequence[str] | None = None) -> int:
  """Draw curves; return the exit code."""
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
    help="the picture, .png or .svg; repeatable (default: curves.png and"
    " curves.svg)",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: plot(args.workdir, args.output or _OUTPUTS))


def plot(
  workdirs: Sequence[str | pathlib.Path],
  outputs: Sequence[pathlib.Path],
) -> None:
  """Draw the curves of all runs in some folders and write the pictures.

  Args:
    workdirs: folders of a run, or of several.
    outputs: paths of the pictures, .png or .svg.

  Raises:
    UserError: a file cannot be read or written, or there is no run.
  """
  for path in outputs:
    plots.check_suffix(path)
  runs = run_reader.find_each(workdirs)
  if not runs:
    raise errors.UserError(
      f"{', '.join(map(str, workdirs))}: no readable run; give folders of runs"
    )
  figure = plots.curves(runs)
  for path in outputs:
    plots.save(figure, path)
    print(f"{path}: {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
  sys.exit(main())
