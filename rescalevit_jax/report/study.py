r"""Run RescaleViT's study on a dataset; write its tables and figures.

  python -m rescalevit_jax.report.study --dataset=cifar10 --weights=weights

trains ViT-B_16, B_32, L_32 and L_16 in RUNS_DIR, each with LN from pretrained
weights (DIR/MODEL.npz), then with LN, BN, GN and Rescale from scratch. The same
command again resumes. At the end, or at the time limit, it writes the files of
rescalevit_jax.report to RUNS_DIR, and in the form of RescaleViT's page:

study.md             accuracies and minutes beside the published ones
curves-MODEL.png     test loss and accuracy of each norm
attention-MODEL.png  attention of head 0 in blocks 0, 3, 6 and 9 for each norm

Flags of rescalevit_jax.sweep are passed on, such as --minutes=60, --jobs=4,
--dry_run, --grid seed=0,1,2 or --config.dtype=bfloat16. Exit code: that
of the sweep.
"""

from collections.abc import Sequence
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.report import output
from rescalevit_jax.report import study_page
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import grid


def main(argv: Sequence[str] | None = None) -> int:
  """Run the study; return the exit code."""
  args, rest = _parser().parse_known_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args, rest))


def _parser():
  parser = cli.parser(
    __doc__, prog="python -m rescalevit_jax.report.study", allow_abbrev=False
  )

  def names(text):
    return text.split(",")

  def add(name, default, meaning, kind=names):
    meaning += f" (default: {default})"
    parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)

  add("dataset", "cifar10", "dataset", str)
  add("models", "ViT-B_16,ViT-B_32,ViT-L_32,ViT-L_16", "models")
  add("norms", "LN,BN,GN,Rescale", "norms")
  parser.add_argument(
    "--weights",
    metavar="DIR",
    help="folder of MODEL.npz (default: no pretrained runs)",
  )
  parser.add_argument(
    "--runs_dir", help="folder of the runs (default: runs/DATASET)"
  )
  parser.add_argument(
    "--index",
    type=cli.index,
    default=0,
    metavar="N",
    help="index of the test image for the attention maps (default: 0)",
  )
  return parser


def _run(args, rest):
  runs_dir = args.runs_dir or f"runs/{args.dataset}"
  words = [f"--runs_dir={runs_dir}", f"--config.dataset={args.dataset}"]
  original = grid.repository_config("original.py")
  for model in args.models:
    starts = [f"LN,{args.weights}/{model}.npz"] if args.weights else []
    words += [f"--config={original}:{model},{x}" for x in starts + args.norms]
  try:
    options, runs = command_line.parse([*words, *rest])
  except errors.UserError as e:
    return cli.fail(str(e), 2)
  outcome = command_line.execute(options, runs)
  executed = not (options.dry_run or options.cluster)
  begun = any((run.workdir / folder.CONFIG).exists() for run in runs)
  at_rest = not outcome.stopped or outcome.out_of_time
  if executed and begun and at_rest:
    _, paths = output.write(runs_dir, runs_dir, args.index)
    paths += study_page.write(
      [run.config for run in runs], pathlib.Path(runs_dir), args.index
    )
    print("\n".join(map(str, paths)))
  return outcome.exit_code


if __name__ == "__main__":
  sys.exit(main())
