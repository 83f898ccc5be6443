r"""Runs a whole study: configs, and a grid of values for their keys.

  python -m rescalevit_jax.sweep --config=configs/quickstart.py \
      --grid model.norm=LN,BN,GN,Rescale --grid seed=0,1,2

makes 12 runs, each a process of its own, in folders of runs/. It shows what is
done, running and left; the same command again skips what is finished and goes
on with the rest. Further examples:

  ... --config=configs/vit_b16_ln.py --config=configs/vit_l16_rescale.py
      several configs; the grid applies to each
  ... --grid base_lr=0.1,0.3 --config.total_steps=500
      keys of the grid vary, other keys are the same for all runs
  ... --dry_run
      prints a command for each run, starts nothing, writes nothing
  ... --jobs=4
      four runs at a time, which share the GPUs
  ... --cluster=slurm --slurm_args timeout_min=600 \
      --slurm_args slurm_partition=gpu --slurm_args gpus_per_node=1
      one Slurm array, through submitit

Exit code: 0 when finished or stopped by a signal, 1 when a run failed, 2 for a
mistake on the command line, 130 after a second signal (with --cluster=local
after the first: its runs go on from their last checkpoint). All config keys:
python -m rescalevit_jax.main --help
"""

import argparse
from collections.abc import Mapping, Sequence
import logging
import pathlib
import shlex
import signal
import sys
from typing import Any, NoReturn

from rescalevit_jax import errors
from rescalevit_jax.config import overrides
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import cluster
from rescalevit_jax.sweep import device_slots
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import schedule
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.training import experiment

_log = logging.getLogger("rescalevit_jax.sweep")  # Not "__main__".


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  terminal.log_to_stderr()
  return cli.run(lambda: _sweep(argv))


def _sweep(argv):
  try:
    options, runs = parse(argv)
  except errors.UserError as e:
    return cli.fail(str(e), 2)
  if options.dry_run:
    _print_commands(runs)
    return 0
  try:
    outcome = execute(
      runs,
      pathlib.Path(options.runs_dir),
      jobs=options.jobs,
      kind=options.cluster,
      parameters=options.slurm_args,
    )
  except KeyboardInterrupt:
    return cli.fail("interrupted; the same command goes on", 130)
  return outcome.exit_code


def parse(
  argv: Sequence[str],
) -> tuple[argparse.Namespace, list[grid.PlannedRun]]:
  """Parses the command line and plans the runs.

  Raises:
    UserError: a flag, a config or a value does not do.
  """
  parser = _parser()
  rest, settings = overrides.split_settings(argv)
  options, unknown = parser.parse_known_args(rest)
  if unknown:
    name = unknown[0].partition("=")[0]
    names = [
      option for action in parser._actions for option in action.option_strings
    ]
    raise errors.UserError(
      f"unknown argument {name!r}; {errors.nearest(name, names)}"
    )
  if options.jobs is not None and options.jobs < 1:
    raise errors.UserError(f"--jobs is {options.jobs}, but must be > 0")
  if options.slurm_args and not options.cluster:
    raise errors.UserError("--slurm_args needs --cluster=slurm")
  options.slurm_args = cluster.parse_parameters(options.slurm_args)
  runs = grid.plan(
    options.config,
    [overrides.parse_axis(text) for text in options.grid],
    [overrides.parse_setting(text, "--config.KEY") for text in settings],
    pathlib.Path(options.runs_dir),
  )
  for run in runs:
    try:
      schedule.work(run)
    except errors.UserError as e:
      raise errors.UserError(f"{run.workdir}: {e}") from e
  return options, runs


def split(
  runs: Sequence[grid.PlannedRun],
) -> tuple[schedule.Outcome, list[grid.PlannedRun]]:
  """Return the finished and diverged runs as an outcome, and the other runs.

  Raises:
    UserError: a run's folder holds another run.
  """
  outcome, left = schedule.Outcome(), []
  for run in runs:
    try:
      result = result_lib.read_same_run(run.config, run.workdir)
    except errors.UserError as e:
      # Folders of a sweep are chosen by another flag than a run's.
      message = str(e).replace("--workdir", "--runs_dir")
      raise errors.UserError(message) from e
    if result is None:
      left.append(run)
    elif result_lib.has_diverged(result):
      outcome.failed.append((run, f"error: {result['error']}"))
    else:
      outcome.done.append(run)
  return outcome, left


def execute(
  runs: Sequence[grid.PlannedRun],
  runs_dir: pathlib.Path,
  *,
  jobs: int | None = None,
  kind: str | None = None,
  parameters: Mapping[str, Any] | None = None,
) -> schedule.Outcome:
  """Runs what is not finished; says on the way how it goes.

  Args:
    runs: what `parse` has planned.
    runs_dir: where their folders are.
    jobs: runs at a time; None: one a GPU, or one.
    kind: `slurm`, which submits the runs and does not wait for them, `local`,
      or None; see `cluster`.
    parameters: of submitit.

  Raises:
    UserError: a run's folder holds another run, or files are missing.
    KeyboardInterrupt: a signal, with `local`.
  """
  outcome, left = split(runs)
  _log.info(
    "%d runs in %s, %d of them finished", len(runs), runs_dir, len(outcome.done)
  )
  if not left:
    if outcome.failed:
      outcome.log()
    return outcome
  if missing := _missing_weights(left):
    raise errors.UserError(
      f"no such file: {', '.join(missing)} (pretrained_path); put the weights"
      " there or leave these runs out"
    )
  executor = None
  if kind:
    executor = cluster.executor(
      kind, runs_dir / ".submitit", parameters or {}, jobs
    )
  # Here and now, for runs that start together would all prepare them.
  datasets = {
    (r.config.dataset, r.config.tfds_data_dir, *r.config.data.values()): r
    for r in left
  }
  for run in datasets.values():
    experiment.load_dataset(run.config)
  if kind == "slurm":
    _submit(left, executor)
    return outcome
  if kind == "local":
    for number in schedule.stop_signals():
      signal.signal(number, signal.default_int_handler)
    failed = cluster.run_locally(left, executor, jobs or 1)
    failures = [run for run, _ in failed]
    outcome.done += [run for run in left if run not in failures]
    outcome.failed += failed
  else:
    places = device_slots.find(jobs)
    diverged = outcome.failed
    outcome = schedule.Schedule(left, outcome.done, places).run()
    outcome.failed = diverged + outcome.failed
  outcome.log()
  return outcome


def _submit(left, executor):
  ids = cluster.submit_to_slurm(left, executor)
  for run, job_id in zip(left, ids, strict=True):
    print(f"{job_id}  {run.workdir}")
  array = ids[0].partition("_")[0]
  folder = left[0].workdir.parent
  _log.info(
    "watch them with `squeue --jobs=%s` and `tail %s`; stop them with `scancel"
    " %s`; the same command with --dry_run says what is finished",
    array,
    folder / "*" / folder_lib.LOG,
    array,
  )


def _missing_weights(runs):
  paths = [
    run.config.pretrained_path
    for run in runs
    if run.config.pretrained_path and not subprocess_run.saved_step(run.workdir)
  ]
  return [p for p in dict.fromkeys(paths) if not pathlib.Path(p).is_file()]


def _print_commands(runs):
  outcome, left = split(runs)
  for run in runs:
    print(shlex.join(run.command))
  sys.stdout.flush()
  for run in outcome.done:
    _log.info("finished already: %s", run.workdir)
  for run, why in outcome.failed:
    _log.info("failed already: %s: %s", run.workdir, why)
  for path in _missing_weights(left):
    _log.info("missing: %s", path)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise errors.UserError(message)


def _parser():
  parser = _Parser(
    prog="python -m rescalevit_jax.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="--config.KEY=VALUE sets a key in all runs.",
  )
  parser.add_argument(
    "--config",
    action="append",
    required=True,
    metavar="FILE[:ARGS]",
    help="a config file, as in rescalevit_jax.main; may be given again",
  )
  parser.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="KEY=VALUE,...",
    help="a key and its values; may be given again, then every combination",
  )
  parser.add_argument(
    "--runs_dir",
    default="runs",
    metavar="DIR",
    help="where the runs' folders lie (default: runs)",
  )
  parser.add_argument(
    "--jobs",
    type=int,
    metavar="N",
    help="runs at a time (default: one a GPU, or one)",
  )
  parser.add_argument(
    "--dry_run",
    action="store_true",
    help="print the commands of the runs, and do nothing",
  )
  parser.add_argument(
    "--cluster",
    choices=("slurm", "local"),
    help="submit the runs through submitit, to Slurm or to this machine",
  )
  parser.add_argument(
    "--slurm_args",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="a parameter of submitit's AutoExecutor, such as timeout_min=600,"
    " slurm_partition=gpu or gpus_per_node=1; may be given again",
  )
  return parser
