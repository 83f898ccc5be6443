r"""Draw accuracy and loss of one or more runs over training steps.

python -m rescalevit_jax.analysis.plot_curves --workdir=runs/a \
    --workdir=runs/b --output=a.png
"""

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
  parser = cli.parser(__doc__)
  plots.add_flags(parser, "curves.png and curves.svg")
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: _run(args.workdir, args.output or _OUTPUTS))


def _run(workdirs, outputs):
  for path in outputs:
    plots.check_suffix(path)
  runs = run_reader.find_each(workdirs)
  if not runs:
    raise errors.UserError(
      f"{', '.join(workdirs)}: no readable run; give folders of runs"
    )
  figure = plots.curves(runs)
  for path in outputs:
    plots.save(figure, path)
    print(f"{path}: {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
  sys.exit(main())
