r"""Run a study: every combination of configs and a grid of config keys.

  python -m rescalevit_jax.sweep --config=configs/quickstart.py \
      --grid model.norm=LN,BN,GN,Rescale --grid seed=0,1,2

starts 12 runs, each as its own process with its own folder in runs/, and
reports their progress. The same command again skips finished runs and resumes
the others. More examples:

  ... --config=configs/vit_b16_ln.py --config=configs/vit_l16_rescale.py
      several configs; the grid applies to each
  ... --grid base_lr=0.1,0.3 --config.total_steps=500
      --grid varies a key, --config.KEY sets a key for all runs
  ... --dry_run
      print the command of each run; start and write nothing
  ... --jobs=4
      four runs at a time, which share the GPUs
  ... --minutes=60
      stop after an hour, with checkpoints; first seeds and fast runs are first
  ... --cluster=slurm --slurm_args timeout_min=600 \
      --slurm_args slurm_partition=gpu --slurm_args gpus_per_node=1
      submit the runs as one Slurm array, through submitit

Exit code: 0 when finished or stopped by a signal, 1 if a run failed, 2 for an
invalid command line, 130 after a second signal. All config keys:
python -m rescalevit_jax.main --help
"""

import argparse
from collections.abc import Sequence
import logging
import math
import pathlib
import shlex
import sys
from typing import Any, NoReturn

from rescalevit_jax import errors
from rescalevit_jax.config import overrides
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import execution
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import outcome as outcome_lib
from rescalevit_jax.sweep import slurm

_log = logging.getLogger(__name__)

_FLAGS: dict[str, dict[str, Any]] = {
  "--config": dict(
    action="append",
    required=True,
    metavar="FILE[:ARGS]",
    help="config file, as in rescalevit_jax.main; repeatable",
  ),
  "--grid": dict(
    action="append",
    default=[],
    metavar="KEY=VALUE,...",
    help="values of a config key; repeatable, for every combination",
  ),
  "--runs_dir": dict(
    type=pathlib.Path,
    default="runs",
    metavar="DIR",
    help="parent of the runs' folders (default: runs)",
  ),
  "--jobs": dict(
    type=int, metavar="N", help="runs at a time (default: one per GPU, or one)"
  ),
  "--minutes": dict(
    type=float,
    default=math.inf,
    metavar="N",
    help="time limit; the same command resumes (default: none)",
  ),
  "--dry_run": dict(
    action="store_true",
    help="print the commands of the runs without starting them",
  ),
  "--cluster": dict(
    choices=("slurm",), help="submit the runs to Slurm, through submitit"
  ),
  "--slurm_args": dict(
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="parameter of submitit's AutoExecutor, such as timeout_min=600,"
    " slurm_partition=gpu or gpus_per_node=1; repeatable",
  ),
}


def main(argv: Sequence[str]) -> int:
  """Run the command line; return the exit code."""
  terminal.log_to_stderr()
  return cli.run(lambda: _sweep(argv))


def parse(
  argv: Sequence[str],
) -> tuple[argparse.Namespace, list[grid.PlannedRun]]:
  """Parse the command line and plan the runs."""
  rest, settings = overrides.split_argv(cli.arguments(argv))
  options, unknown = _parser().parse_known_args(rest)
  if unknown:
    name = unknown[0].partition("=")[0]
    raise errors.UserError(
      f"unknown argument {name!r}; {errors.nearest(name, ['--help', *_FLAGS])}"
    )
  if options.jobs is not None and options.jobs < 1:
    raise errors.UserError(f"--jobs: {options.jobs} is less than 1; raise it")
  if not options.minutes > 0:
    raise errors.UserError(
      f"--minutes: {options.minutes:g} is not positive; raise it"
    )
  if options.cluster and options.minutes < math.inf:
    raise errors.UserError(
      "--minutes: has no effect with --cluster; use --slurm_args timeout_min=N"
    )
  if options.slurm_args and not options.cluster:
    raise errors.UserError("--slurm_args: has no effect; add --cluster=slurm")
  options.slurm_args = slurm.parse_parameters(options.slurm_args)
  runs = grid.plan(
    options.config,
    [overrides.parse_axis(text) for text in options.grid],
    settings,
    options.runs_dir,
  )
  for run in runs:
    _ = run.step_flops  # An error if the sizes of its model are inconsistent.
  return options, runs


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise errors.UserError(message)


def _parser():
  parser = _Parser(
    prog="python -m rescalevit_jax.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="--config.KEY=VALUE sets a key for all runs.",
  )
  for name, options in _FLAGS.items():
    parser.add_argument(name, **options)
  return parser


def _sweep(argv):
  try:
    options, runs = parse(argv)
  except errors.UserError as e:
    return cli.fail(str(e), 2)
  return execute(options, runs).exit_code


def execute(
  options: argparse.Namespace, runs: Sequence[grid.PlannedRun]
) -> outcome_lib.Outcome:
  """Execute, print or submit the runs; takes the result of `parse`."""
  if options.dry_run:
    _print_commands(runs)
    return outcome_lib.Outcome()
  if options.cluster:
    return execution.submit(
      runs, options.runs_dir, jobs=options.jobs, parameters=options.slurm_args
    )
  return execution.execute(
    runs, options.runs_dir, jobs=options.jobs, minutes=options.minutes
  )


def _print_commands(runs):
  outcome, left = outcome_lib.split_by_result(runs)
  for run in runs:
    print(shlex.join(run.command))
  sys.stdout.flush()
  for run in outcome.done:
    _log.info("already finished: %s", run.workdir)
  for run, reason in outcome.failed:
    _log.info("already failed: %s: %s", run.workdir, reason)
  for path in execution.missing_weights(left):
    _log.info("missing: %s", path)
