r"""Draw or tabulate the accuracies of the norm-free study from its CSV file.

python -m rescalevit_jax.report.plot_accuracies \
    docs/results/norm_free/accuracies_6000.csv --output=docs/images/accuracy.svg
python -m rescalevit_jax.report.plot_accuracies --rates \
    docs/results/norm_free/accuracies.csv --output=accuracies.png
python -m rescalevit_jax.report.plot_accuracies --output=control.md \
    docs/results/norm_free/accuracies_6000.csv \
    --reference=LN-rescalenet-unit-slow

A picture shows each method's test accuracy. --rates adds held-out accuracies by
learning rate. A table compares each method with the reference. A method's norm
is its name up to the first hyphen.
"""

from collections.abc import Sequence
import csv
import dataclasses
import math
import pathlib
import sys

from matplotlib import figure as figure_lib

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.models import norms
from rescalevit_jax.report import lr_table
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Draw the accuracies; return the exit code."""
  parser = cli.parser(__doc__)
  parser.add_argument("csv", type=pathlib.Path)
  parser.add_argument(
    "--output",
    action="append",
    type=pathlib.Path,
    required=True,
    help="picture (.png or .svg) or table (.md); repeatable",
  )
  parser.add_argument(
    "--rates", action="store_true", help="draw held-out accuracies too"
  )
  parser.add_argument(
    "--reference",
    default=lr_table.REFERENCE,
    metavar="METHOD",
    help="method that a table compares with (default: %(default)s)",
  )
  parser.add_argument(
    "--label",
    action="append",
    default=[],
    metavar="METHOD=TEXT",
    help="show this method under another name; repeatable. If given, methods"
    " without a label are left out",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(lambda: _run(args))


def _run(args):
  for path in args.output:
    if path.suffix != ".md":
      plots.check_suffix(path)
  tuned_methods = read(args.csv)
  pairs = [label.split("=", 1) for label in args.label]
  if any(len(pair) == 1 for pair in pairs):
    raise errors.UserError("--label: no '='; write METHOD=TEXT")
  labels = dict(pairs)
  if len(labels) < len(pairs):
    raise errors.UserError("--label: a method has two labels; give one")
  if unknown := set(labels) - {x.method for x in tuned_methods}:
    raise errors.UserError(
      f"--label: {args.csv} has no method {min(unknown)!r}; correct its name"
    )
  if labels:
    tuned_methods = [x for x in tuned_methods if x.method in labels]
  for path in args.output:
    if path.suffix == ".md":
      plots.write(path, _table(tuned_methods, labels, args))
    else:
      figure = (
        lr_table.draw(tuned_methods)
        if args.rates
        else bars(tuned_methods, labels)
      )
      plots.save(figure, path)


def _table(tuned_methods, labels, args):
  tested = [x for x in tuned_methods if x.test_accuracy]
  if not any(x.percent for x in tested if x.method == args.reference):
    raise errors.UserError(
      f"--reference: {args.csv} has no test accuracy of {args.reference!r}, or"
      " no --label names it; choose a tested method, and label it too"
    )
  named = [
    dataclasses.replace(x, method=labels.get(x.method, x.method))
    for x in tested
  ]
  return lr_table.table(named, labels.get(args.reference, args.reference))


def read(path: pathlib.Path) -> list[lr_table.TunedMethod]:
  """Return the methods in a file that `lr_table.write_csv` wrote.

  If a method was tested at several learning rates, the one with the best
  held-out accuracy counts.
  """
  # Accuracies by dataset and method, then by learning rate, and by seed.
  tried: dict[tuple[str, str], dict[float, float | None]] = {}
  tested: dict[tuple[str, str], dict[float, dict[int, float | None]]] = {}
  hint = "use an accuracies.csv of rescalevit_jax.report.norm_free"
  try:
    with open(path, encoding="utf-8", newline="") as f:
      for row in csv.DictReader(f):
        if None in row or None in row.values():
          raise ValueError(f"line {list(row.values())}")
        key, lr = (row["dataset"], row["method"]), float(row["base_lr"])
        accuracy = float(row["accuracy"]) if row["accuracy"] else None
        if not 0 <= (accuracy or 0) <= 1:
          raise ValueError(f"accuracy {accuracy}")
        if not 0 < lr < math.inf:
          raise ValueError(f"base_lr {lr}")
        rates = tried.setdefault(key, {})
        if row["phase"] == "select":
          rates[lr] = accuracy
        else:
          seeds = tested.setdefault(key, {}).setdefault(lr, {})
          seeds[int(row["seed"])] = accuracy
  except (csv.Error, KeyError, ValueError) as e:
    raise errors.UserError(f"{path}: {e} is not as expected; {hint}") from e
  if not tested:
    raise errors.UserError(f"{path}: has no tested run; {hint}")
  tuned_methods = []
  for (dataset, method), rates in tried.items():
    norm = method.partition("-")[0]
    if norm not in norms.NORMS:
      raise errors.UserError(
        f"{path}: method {method!r}: {errors.nearest(norm, norms.NORMS)}"
      )
    finals = tested.get((dataset, method), {})
    best = max(finals, key=lambda lr: rates.get(lr) or 0.0, default=None)
    seeds = {} if best is None else finals[best]
    tuned_methods.append(
      lr_table.TunedMethod(dataset, method, norm, rates, best, seeds)
    )
  return tuned_methods


def bars(
  tuned_methods: Sequence[lr_table.TunedMethod], labels: dict[str, str]
) -> figure_lib.Figure:
  """Draw a bar for each tested method, a panel per dataset.

  `labels` has names to draw instead of the methods' names.
  """
  tested = [x for x in tuned_methods if x.test_accuracy]
  datasets = list(dict.fromkeys(x.dataset for x in tested))
  methods = list(dict.fromkeys(x.method for x in tested))
  height = 0.38 * len(methods) + 0.8
  figure = figure_lib.Figure((9, height), layout="constrained")
  panels = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
  for axes, dataset in zip(panels, datasets, strict=True):
    shown = {x.method: x for x in tested if x.dataset == dataset}
    for index, method in enumerate(methods):
      if method not in shown:
        axes.text(0, index, "  not run", va="center", color="0.4")
    for x in shown.values():
      index, end, words = methods.index(x.method), 0.0, []
      if x.percent:
        mean, deviation = x.mean, x.deviation
        color = plots.norm_color(x.norm)
        axes.barh(index, mean, height=0.7, xerr=deviation, color=color)
        count = " (1 seed)" if deviation is None else f" ± {deviation:.1f}"
        end = mean + (deviation or 0)
        words.append(f"{mean:.1f}{count}")
      if x.num_diverged:
        words.append(f"{x.num_diverged} diverged")
      axes.text(end, index, f"  {', '.join(words)}", va="center")
    axes.set_title(plots.plain(dataset), loc="left")
    axes.set_xlabel("test accuracy, %")
    if any(x.percent for x in shown.values()):
      axes.set_xlim(0, 1.4 * axes.dataLim.x1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(
      range(len(methods)), [plots.plain(labels.get(x, x)) for x in methods]
    )
  panels[0].invert_yaxis()
  return figure


if __name__ == "__main__":
  sys.exit(main())
