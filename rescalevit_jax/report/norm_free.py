r"""LN against no norm: chooses learning rates, trains, makes the table.

Each method of configs/norm_free.py is trained with every learning rate of a
grid, on all training images but some, and tested on those, with seed 0; then
with the best rate, on all training images, with several seeds. A run looks at
the test images once, after its last step. The same command again goes on, or
only makes the table: table.md, accuracies.csv and accuracies.png in
RUNS_DIR/final-FINAL_STEPS, in place of what an earlier command has left there.
A run whose loss is not finite is told as such, and not tried again.

python -m rescalevit_jax.report.norm_free --jobs=4 --final_steps=6000
python -m rescalevit_jax.report.norm_free --methods=LN,Cal --datasets=cifar10 \
    --rates=0.1,0.2
python -m rescalevit_jax.report.norm_free --model=ViT-B_32 --steps=20000 \
    --final_steps=20000

--config.KEY=VALUE sets a key in all runs. Exit code: 0 when finished or stopped
by a signal, 1 after a failure, 130 after a second signal.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import logging
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax import sweep
from rescalevit_jax.analysis import plots
from rescalevit_jax.config import overrides
from rescalevit_jax.report import lr_table
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import subprocess_run

_log = logging.getLogger("rescalevit_jax.norm_free")
# Keys that the study sets itself, besides those of the methods.
_OWN_KEYS = {
  "base_lr",
  "data.num_val",
  "dataset",
  "eval_every",
  "model_name",
  "seed",
  "total_steps",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the study; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )

  def names(text):
    return list(dict.fromkeys(text.split(",")))

  def positive(text):
    if (number := int(text)) < 1:
      raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number

  def add(name, default, meaning, kind=names):
    parser.add_argument(
      f"--{name}", type=kind, default=default, help=f"{meaning} ({default})"
    )

  add("config", "configs/norm_free.py", "config file with METHODS", str)
  parser.add_argument(
    "--methods", type=names, help="methods of that file (all of them)"
  )
  add("datasets", "cifar10,cifar100", "data sets")
  parser.add_argument(
    "--model",
    help="such as ViT-B_32, at 224x224, in RUNS_DIR/MODEL (a small one at"
    " 32x32, in RUNS_DIR)",
  )
  add("rates", "0.05,0.1,0.2,0.4,0.8", "learning rates to choose from")
  add("seeds", "1,2,3", "seeds of the final runs")
  add("num_val", 5000, "training images to choose by", positive)
  add("steps", 1500, "steps of the runs that choose", positive)
  add("final_steps", 1500, "steps of the final runs", positive)
  add("jobs", 1, "runs at a time", positive)
  add("runs_dir", pathlib.Path("runs/norm_free"), "folder", pathlib.Path)
  args, settings = parser.parse_known_args(argv)
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args, settings))


def _check_settings(settings, methods):
  """Raises UserError for unknown arguments and for keys of the study."""
  own_keys = _OWN_KEYS.union(*methods.values())
  for setting in settings:
    if not setting.startswith("--config."):
      raise errors.UserError(f"unknown argument {setting}; see --help")
    key = setting.removeprefix("--config.").partition("=")[0]
    if key in own_keys:
      raise errors.UserError(
        f"{setting}: the study sets {key} itself; leave it out"
      )


def _run(args, settings):
  known = overrides.methods(args.config)
  _check_settings(settings, known)
  args.methods = args.methods or list(known)
  if args.model:
    args.runs_dir /= args.model

  def plan(phase, steps, dataset, method, axes, **keys):
    """Returns a sweep's runs: of one method on one data set."""
    folder = args.runs_dir / f"{phase}-{steps}" / dataset / method
    reference = f"{args.config}:{method}" + (
      f",{args.model}" if args.model else ""
    )
    options = [f"--config={reference}", f"--runs_dir={folder}"]
    for name, values in axes.items():
      options += ["--grid", f"{name}={','.join(values)}"]
    keys |= {"dataset": dataset, "total_steps": steps}
    options += [f"--config.{name}={value}" for name, value in keys.items()]
    return sweep.parse([*options, *settings])[1]

  def choosing(dataset, method):
    keys = {"data.num_val": args.num_val, "eval_every": args.steps}
    axes = {"base_lr": args.rates}
    return plan("select", args.steps, dataset, method, axes, **keys)

  def testing(dataset, method, rate):
    last = {"eval_every": args.final_steps}
    axes = {"base_lr": [rate], "seed": args.seeds}
    return plan("final", args.final_steps, dataset, method, axes, **last)

  def execute(plans):
    planned = [run for runs in plans.values() for run in runs]
    return sweep.execute(planned, args.runs_dir, jobs=args.jobs)

  plans = {
    (dataset, method): choosing(dataset, method)
    for dataset in args.datasets
    for method in args.methods
  }
  testing(*next(iter(plans)), args.rates[0])  # So that mistakes are found now.
  done = execute(plans)
  if done.stopped:
    return done.exit_code
  found = accuracies(plans)
  outcomes = {key: _choose(key, runs, found) for key, runs in plans.items()}
  plans = {
    key: testing(*key, repr(x.rate))
    for key, x in outcomes.items()
    if x.rate is not None
  }
  done = execute(plans)
  if done.stopped:
    return done.exit_code
  found = accuracies(plans)
  for key, runs in plans.items():
    tested = {run.config.seed: found[run.workdir] for run in runs}
    outcomes[key] = dataclasses.replace(outcomes[key], tested=tested)
  _write(list(outcomes.values()), args.runs_dir / f"final-{args.final_steps}")
  return 0


def accuracies(
  plans: Mapping[tuple[str, str], Sequence[grid.PlannedRun]],
) -> dict[pathlib.Path, float | None]:
  """Returns what runs came to after their last step, by folder.

  A run that diverged has None.

  Args:
    plans: by data set and method; none of them is running.

  Raises:
    UserError: a run failed for another reason.
  """
  found = {}
  for run in [run for runs in plans.values() for run in runs]:
    result = result_lib.read_same_run(run.config, run.workdir)
    if result is None:
      why = subprocess_run.failure(run.workdir, None).removeprefix("error: ")
      raise errors.UserError(f"{run.workdir}: {why}")
    found[run.workdir] = result.get("last_accuracy")
  return found


def _choose(key, runs, found):
  """Returns what comes of training with each learning rate."""
  tried = {run.config.base_lr: found[run.workdir] for run in runs}
  kept = sorted(rate for rate, x in tried.items() if x is not None)
  rate = max(kept, key=tried.get, default=None)
  if len(tried) > 1 and rate in (min(tried), max(tried)):
    _log.warning(
      "%s/%s: %g is the best of these learning rates, and the outermost: try"
      " others beyond it",
      *key,
      rate,
    )
  return lr_table.Outcome(*key, runs[0].config.model.norm, tried, rate)


def _write(outcomes, folder):
  folder.mkdir(parents=True, exist_ok=True)
  text = lr_table.table(outcomes)
  (folder / "table.md").write_text(text, encoding="utf-8")
  lr_table.write_csv(outcomes, folder / "accuracies.csv")
  plots.save(lr_table.draw(outcomes), folder / "accuracies.png")
  print(text)
  _log.info("written: %s/{table.md,accuracies.csv,accuracies.png}", folder)


if __name__ == "__main__":
  sys.exit(main())
