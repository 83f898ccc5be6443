r"""Compare LN with norm-free methods: tune the learning rate, train, tabulate.

Each method of configs/norm_free.py is first trained with every learning rate of
a grid and seed 0, on the training images without a held-out part. Its accuracy
on the held-out images selects the learning rate. It is then trained on all
training images with several seeds, and evaluated once on the test images, after
the last step. The same command again resumes, or only writes the table:
table.md, accuracies.csv and accuracies.png in RUNS_DIR/final-FINAL_STEPS. They
replace the files of an earlier command. A run whose loss is not finite counts
as diverged and is not repeated.

python -m rescalevit_jax.report.norm_free --jobs=4 --final_steps=6000
python -m rescalevit_jax.report.norm_free --methods=LN,Cal --datasets=cifar10 \
    --rates=0.1,0.2
python -m rescalevit_jax.report.norm_free --model=ViT-B_32 --steps=20000 \
    --final_steps=20000

--config.KEY=VALUE sets a key for all runs. Exit code: 0 when finished or
stopped by a signal, 1 after a failure, 130 after a second signal.
"""

from collections.abc import Sequence
import dataclasses
import logging
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.config import overrides
from rescalevit_jax.report import lr_table
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import execution
from rescalevit_jax.sweep import outcome as outcome_lib

_log = logging.getLogger("rescalevit_jax.norm_free")
# Keys that the study sets, besides the keys of the methods.
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
  """Run the study; return the exit code."""
  terminal.log_to_stderr()
  return cli.run(lambda: _run(argv))


def _parser():
  parser = cli.parser(__doc__, allow_abbrev=False)

  def names(text):
    return list(dict.fromkeys(text.split(",")))

  def add(name, default, meaning, kind=names):
    meaning += f" (default: {default})"
    parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)

  add("config", "configs/norm_free.py", "config file with METHODS", str)
  parser.add_argument(
    "--methods", type=names, help="methods of that file (default: all)"
  )
  add("datasets", "cifar10,cifar100", "datasets")
  parser.add_argument(
    "--model",
    help="model at 224x224, such as ViT-B_32, with runs in RUNS_DIR/MODEL"
    " (default: a small model at 32x32)",
  )
  add("rates", "0.05,0.1,0.2,0.4,0.8", "learning rates to try")
  add("seeds", "1,2,3", "seeds of the final runs")
  add("num_val", 5000, "number of held-out training images", cli.positive)
  add("steps", 1500, "steps of the runs that select", cli.positive)
  add("final_steps", 1500, "steps of the final runs", cli.positive)
  add("jobs", 1, "runs at a time", cli.positive)
  add("runs_dir", pathlib.Path("runs/norm_free"), "folder", pathlib.Path)
  return parser


def _plan(args, settings, dataset, method, lr=None):
  """Plan the runs of a method.

  Without `lr`, these are a run for each learning rate, evaluated on held-out
  images; else a run for each seed, evaluated once on the test images.
  """
  if lr is None:
    phase, steps = "select", args.steps
    axes, keys = {"base_lr": args.rates}, {"data.num_val": args.num_val}
  else:
    phase, steps = "final", args.final_steps
    axes, keys = {"base_lr": [lr], "seed": args.seeds}, {}
  keys |= {"eval_every": steps, "dataset": dataset, "total_steps": steps}
  folder = args.runs_dir / f"{phase}-{steps}" / dataset / method
  reference = f"{args.config}:{method}"
  if args.model:
    reference += f",{args.model}"
  options = [f"--config={reference}", f"--runs_dir={folder}"]
  for name, values in axes.items():
    options += ["--grid", f"{name}={','.join(values)}"]
  options += [f"--config.{name}={value}" for name, value in keys.items()]
  options += [f"--config.{setting}" for setting in settings]
  return command_line.parse(options)[1]


def _execute(args, plans):
  planned = [run for runs in plans.values() for run in runs]
  return execution.execute(planned, args.runs_dir, jobs=args.jobs)


def _run(argv):
  rest, settings = overrides.split_argv(cli.arguments(argv))
  args, unknown = _parser().parse_known_args(rest)
  if unknown:
    raise errors.UserError(f"unknown argument {unknown[0]}; see --help")
  known = overrides.methods(args.config)
  own_keys = _OWN_KEYS.union(*known.values())
  for setting in settings:
    if setting.key in own_keys:
      raise errors.UserError(
        f"--config.{setting}: the study sets {setting.key} itself; leave it out"
      )
  if not known:
    raise errors.UserError(
      f"{args.config}: has no METHODS; use configs/norm_free.py or a file"
      " like it"
    )
  if args.model:
    args.runs_dir /= args.model
  plans = {
    (dataset, method): _plan(args, settings, dataset, method)
    for dataset in args.datasets
    for method in args.methods or known
  }
  # To report errors early.
  _plan(args, settings, *next(iter(plans)), args.rates[0])
  outcome = _execute(args, plans)
  if outcome.stopped:
    return outcome.exit_code
  found = _accuracies(plans)
  tuned_methods = {
    key: _select_lr(key, runs, found) for key, runs in plans.items()
  }
  plans = {
    key: _plan(args, settings, *key, repr(x.lr))
    for key, x in tuned_methods.items()
    if x.lr is not None
  }
  outcome = _execute(args, plans)
  if outcome.stopped:
    return outcome.exit_code
  found = _accuracies(plans)
  for key, runs in plans.items():
    tested = {run.config.seed: found[run.workdir] for run in runs}
    tuned_methods[key] = dataclasses.replace(
      tuned_methods[key], test_accuracy=tested
    )
  _write(
    list(tuned_methods.values()), args.runs_dir / f"final-{args.final_steps}"
  )
  return 0


def _accuracies(plans):
  """Return the accuracies of ended runs after their last step, by folder.

  The accuracy of a diverged run is None. A run that failed for another reason
  is an error.
  """
  found = {}
  for run in [run for runs in plans.values() for run in runs]:
    result = result_lib.read_same_run(run.config, run.workdir)
    if result is None:
      reason = outcome_lib.why_not_finished(run.workdir, None) or "ended early"
      raise errors.UserError(f"{run.workdir}: {reason.removeprefix('error: ')}")
    found[run.workdir] = result.get("last_accuracy")
  return found


def _select_lr(key, runs, found):
  """Return the result of trying every learning rate."""
  tried = {run.config.base_lr: found[run.workdir] for run in runs}
  kept = sorted(lr for lr, accuracy in tried.items() if accuracy is not None)
  lr = max(kept, key=tried.get, default=None)
  if len(tried) > 1 and lr in (min(tried), max(tried)):
    _log.warning(
      "%s/%s: the best learning rate, %g, is at the edge of the grid; extend"
      " --rates",
      *key,
      lr,
    )
  return lr_table.TunedMethod(*key, runs[0].config.model.norm, tried, lr)


def _write(tuned_methods, folder):
  folder.mkdir(parents=True, exist_ok=True)
  text = lr_table.table(tuned_methods)
  atomic_file.write(folder / "table.md", text)
  lr_table.write_csv(tuned_methods, folder / "accuracies.csv")
  plots.save(lr_table.draw(tuned_methods), folder / "accuracies.png")
  print(text)
  _log.info("written: %s/{table.md,accuracies.csv,accuracies.png}", folder)


if __name__ == "__main__":
  sys.exit(main())
