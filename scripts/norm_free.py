"""LN against no norm: chooses learning rates, trains, makes the table.

Each method of configs/norm_free.py is trained with every learning rate of a
grid, on all training images but some, and tested on those; then with the best
rate, on all training images, with several seeds. The test images are looked at
once, after the last step. The same command again goes on, or only makes the
table.

python scripts/norm_free.py --jobs=4 --final_steps=6000
python scripts/norm_free.py --methods=LN,Cal --datasets=cifar10 --rates=0.1,0.2
python scripts/norm_free.py --model=ViT-B_32 --steps=20000 --final_steps=20000

--config.KEY=VALUE sets a key in all runs.
"""

import argparse
from collections.abc import Sequence
import csv
import dataclasses
import logging
import pathlib
import runpy
import statistics
import subprocess
import sys

from matplotlib import figure as figure_lib
from scipy import stats

from rescalevit_jax import errors
from rescalevit_jax import plots
from rescalevit_jax import program
from rescalevit_jax import progress
from rescalevit_jax import runs
from rescalevit_jax import sweep

_log = logging.getLogger("rescalevit_jax.norm_free")
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "norm_free.py"
METHODS = ",".join(runpy.run_path(str(CONFIG))["METHODS"])
OWN_KEYS = (
  "base_lr",
  "data.held_out",
  "dataset",
  "eval_every",
  "seed",
  "total_steps",
)
# The others' differences are those from it.
REFERENCE = "LN"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the study; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )

  def names(text):
    return text.split(",")

  def add(name, default, meaning, kind=names):
    shown = default if isinstance(default, str) else str(default)
    parser.add_argument(
      f"--{name}", type=kind, default=default, help=f"{meaning} ({shown})"
    )

  add("methods", METHODS, "methods of configs/norm_free.py")
  add("datasets", "cifar10,cifar100", "data sets")
  parser.add_argument(
    "--model", help="such as ViT-B_32, at 224x224 (a small one at 32x32)"
  )
  add("rates", "0.05,0.1,0.2,0.4,0.8", "learning rates to choose from")
  add("seeds", "1,2,3", "seeds of the final runs")
  add("held_out", 5000, "training images to choose by", int)
  add("steps", 1500, "steps of the runs that choose", int)
  add("final_steps", 1500, "steps of the final runs", int)
  add("jobs", 1, "runs at a time", int)
  add("runs_dir", pathlib.Path("runs/norm_free"), "folder", pathlib.Path)
  args, settings = parser.parse_known_args(argv)
  for setting in settings:
    if not setting.startswith("--config."):
      parser.error(f"unknown argument {setting}")
    key = setting.removeprefix("--config.").partition("=")[0]
    if key in OWN_KEYS:
      parser.error(f"{setting}: the study sets {key} itself; see --help")
  progress.log_to_stderr()
  return program.run(lambda: _run(args, settings))


def _run(args, settings):
  chosen = {
    (dataset, method): _choose(args, settings, dataset, method)
    for method in args.methods
    for dataset in args.datasets
  }
  outcomes = [
    _test(args, settings, chosen[dataset, method])
    for dataset in args.datasets
    for method in args.methods
  ]
  text = table(outcomes)
  (args.runs_dir / "table.md").write_text(text, encoding="utf-8")
  write_csv(outcomes, args.runs_dir / "accuracies.csv")
  plots.save(draw(outcomes), args.runs_dir / "accuracies.png")
  print(text)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a method on a data set.

  Attributes:
    dataset: its name.
    method: its name in configs/norm_free.py.
    norm: its model's.
    tried: accuracy on the held-out images, a fraction, by learning rate.
    failed: learning rates whose runs failed.
    rate: the learning rate chosen.
    accuracies: on the test images after the last step, by seed.
  """

  dataset: str
  method: str
  norm: str
  tried: dict[float, float]
  failed: tuple[float, ...]
  rate: float
  accuracies: dict[int, float] = dataclasses.field(default_factory=dict)


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the outcome in Markdown.

  The difference from LN is that of the means; its standard error is
  sqrt(s1^2 / n1 + s2^2 / n2), and p that of Welch's t-test, two-sided.
  """
  lines = [
    "| data set | method | rate | held-out accuracy by rate, % | test accuracy,"
    " % (n) | difference from LN, points | p |",
    "| --- | --- | --: | --- | --: | --: | --: |",
  ]
  for outcome in outcomes:
    values = [100 * x for x in outcome.accuracies.values()]
    percent = {rate: f"{100 * x:.1f}" for rate, x in outcome.tried.items()}
    percent |= dict.fromkeys(outcome.failed, "failed")
    tried = ", ".join(f"{rate:g}: {x}" for rate, x in sorted(percent.items()))
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    lines.append(
      f"| {outcome.dataset} | {outcome.method} | {outcome.rate:g} | {tried} |"
      f" {statistics.fmean(values):.2f}{spread} ({len(values)}) |"
      f" {_difference(outcome, outcomes)} |"
    )
  return "\n".join(lines) + "\n"


def _difference(outcome, outcomes):
  """Returns the last two cells of a row."""
  values = [100 * x for x in outcome.accuracies.values()]
  for other in outcomes:
    if (other.dataset, other.method) == (outcome.dataset, REFERENCE):
      theirs = [100 * x for x in other.accuracies.values()]
      break
  else:
    return "– | –"
  if outcome is other:
    return "– | –"
  difference = statistics.fmean(values) - statistics.fmean(theirs)
  text = f"{difference:+.2f}"
  if min(len(values), len(theirs)) < 2:
    return f"{text} | –"
  error = sum(statistics.variance(x) / len(x) for x in (values, theirs)) ** 0.5
  p = stats.ttest_ind(values, theirs, equal_var=False).pvalue
  return f"{text} ± {error:.2f} | {p:.2g}"


def write_csv(outcomes: Sequence[Outcome], path: pathlib.Path) -> None:
  """Writes a line for each run: phase 'select' or 'final'."""
  with open(path, "w", encoding="utf-8", newline="") as f:
    writer = csv.writer(f, lineterminator="\n")
    writer.writerow(
      ["dataset", "method", "phase", "base_lr", "seed", "accuracy"]
    )
    for x in outcomes:
      for rate, accuracy in sorted(x.tried.items()):
        writer.writerow([x.dataset, x.method, "select", rate, 0, accuracy])
      for seed, accuracy in sorted(x.accuracies.items()):
        writer.writerow([x.dataset, x.method, "final", x.rate, seed, accuracy])


def draw(outcomes: Sequence[Outcome]) -> figure_lib.Figure:
  """Draws, a row a data set, what the rates came to and the test accuracies.

  Methods of one norm share its colour; faint: LN's mean.
  """
  datasets = list(dict.fromkeys(x.dataset for x in outcomes))
  figure = figure_lib.Figure((9, 3.6 * len(datasets)), layout="constrained")
  axes = figure.subplots(len(datasets), 2, squeeze=False)
  for dataset, (left, right) in zip(datasets, axes, strict=True):
    shown = [x for x in outcomes if x.dataset == dataset]
    for i, x in enumerate(shown):
      same_norm = [y.method for y in shown if y.norm == x.norm]
      place = same_norm.index(x.method)
      style = {
        "color": plots.norm_color(x.norm),
        "marker": "osD^v"[place % 5],
        "linestyle": ("-", "--", ":", "-.", (0, (5, 1)))[place % 5],
        "markerfacecolor": "white" if place else None,
      }
      rates = sorted(x.tried)
      left.plot(
        rates, [100 * x.tried[r] for r in rates], label=x.method, **style
      )
      values = [100 * a for a in x.accuracies.values()]
      spread = statistics.stdev(values) if len(values) > 1 else None
      right.errorbar(statistics.fmean(values), i, xerr=spread, **style)
      if x.method == REFERENCE:
        right.axvline(statistics.fmean(values), color="0.8", zorder=0)
    left.set_xscale("log", base=2)
    rates = sorted({rate for x in shown for rate in x.tried})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.set_xlabel("learning rate")
    left.set_ylabel("accuracy on held-out images, %")
    left.set_title(f"{dataset}: choosing", loc="left")
    right.set_yticks(
      range(len(shown)), [f"{x.method} ({x.rate:g})" for x in shown]
    )
    right.invert_yaxis()
    right.set_xlabel("test accuracy, % (bars: standard deviation)")
    right.set_title(f"{dataset}: the best rate", loc="left")
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc="outside lower center",
    fontsize="small",
    frameon=False,
    ncols=5,
  )
  return figure


def _choose(args, settings, dataset, method):
  """Returns what comes of training with each learning rate."""
  folder, finished, missing = _sweep(
    args,
    settings,
    pathlib.Path(f"select-{args.steps}") / dataset / method,
    {"base_lr": args.rates},
    {
      "dataset": dataset,
      "total_steps": args.steps,
      "data.held_out": args.held_out,
    },
  )
  tried = {run.config.base_lr: _accuracy(run) for run in finished}
  failed = tuple(run.config.base_lr for run in missing)
  if not tried:
    raise errors.UserError(f"{folder}: every learning rate failed; see above")
  if failed:
    _log.warning(
      "%s: left out, since their runs failed: the learning rates %s",
      folder,
      ", ".join(f"{rate:g}" for rate in failed),
    )
  norm = finished[0].config.model.norm
  rate = max(sorted(tried), key=tried.get)
  if len(tried) > 1 and rate in (min(tried), max(tried)):
    _log.warning(
      "%s: %g is the best of these learning rates, and the outermost: try"
      " others beyond it",
      folder,
      rate,
    )
  return Outcome(dataset, method, norm, tried, failed, rate)


def _test(args, settings, outcome):
  """Returns the outcome with what the seeds come to at the chosen rate."""
  folder, finished, missing = _sweep(
    args,
    settings,
    pathlib.Path(f"final-{args.final_steps}")
    / outcome.dataset
    / outcome.method,
    {"base_lr": [repr(outcome.rate)], "seed": args.seeds},
    {
      "dataset": outcome.dataset,
      "total_steps": args.final_steps,
      "eval_every": args.final_steps,
    },
  )
  if missing:
    raise errors.UserError(
      f"{folder}: not finished; the same command goes on from there"
    )
  accuracies = {run.config.seed: _accuracy(run) for run in finished}
  return dataclasses.replace(outcome, accuracies=accuracies)


def _sweep(args, settings, folder, grid, keys):
  """Runs a grid; returns its folder, finished runs, and the others' plans."""
  reference = f"{CONFIG}:{folder.name}"
  folder = args.runs_dir / folder
  options = [
    f"--config={reference}" + (f",{args.model}" if args.model else ""),
    f"--runs_dir={folder}",
    f"--jobs={args.jobs}",
  ]
  for key, values in grid.items():
    options += ["--grid", f"{key}={','.join(values)}"]
  options += [f"--config.{key}={value}" for key, value in keys.items()]
  options += settings
  planned = {run.workdir: run for run in sweep.parse(options)[1]}
  command = [sys.executable, "-m", "rescalevit_jax.sweep", *options]
  code = subprocess.run(command, check=False).returncode
  if code not in (0, 1):  # 1: some runs failed.
    raise errors.UserError(
      f"{folder}: not finished; the same command goes on from there"
    )
  # Others may have been there before: of another model, rate or seed.
  finished = [
    run
    for run in runs.find(folder).runs
    if run.result is not None and run.workdir in planned
  ]
  for run in finished:
    del planned[run.workdir]
  return folder, finished, list(planned.values())


def _accuracy(run):
  return run.result["last_accuracy"]


if __name__ == "__main__":
  sys.exit(main())
