"""Compare methods at their best learning rates: table, CSV and picture."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import pathlib
import statistics
from typing import Any

from matplotlib import figure as figure_lib

from rescalevit_jax.analysis import plots
from rescalevit_jax.report import differences
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import csv_text
from rescalevit_jax.runtime import markdown

REFERENCE = "LN"


@dataclasses.dataclass(frozen=True)
class TunedMethod:
  """The results of a method on a dataset.

  Accuracies are fractions, or None for a run that diverged: its loss is not
  finite.
  """

  dataset: str
  method: str
  norm: str
  # On held-out training images, by learning rate.
  val_accuracy: Mapping[float, float | None]
  # The selected learning rate; None if all runs diverged.
  lr: float | None
  # After the last step, by seed.
  test_accuracy: Mapping[int, float | None] = dataclasses.field(
    default_factory=dict
  )

  @property
  def percent(self) -> list[float]:
    """Test accuracies in percent, without runs that diverged."""
    return [100 * x for x in self.test_accuracy.values() if x is not None]

  @property
  def mean(self) -> float:
    """Mean of `percent`."""
    return statistics.fmean(self.percent)

  @property
  def deviation(self) -> float | None:
    """Standard deviation of `percent`; None for a single run."""
    return statistics.stdev(self.percent) if len(self.percent) > 1 else None

  @property
  def num_diverged(self) -> int:
    """Number of tested runs that diverged."""
    return len(self.test_accuracy) - len(self.percent)


def table(
  tuned_methods: Sequence[TunedMethod], reference: str = REFERENCE
) -> str:
  """Return the results as a Markdown table.

  Each method's mean is compared with the reference's on the same dataset, if
  both have two runs or more and none diverged: by Welch's t-test, with Holm's
  correction over all rows. The standard error of the difference is sqrt(s1^2 /
  n1 + s2^2 / n2).
  """
  means = {x.dataset: x for x in tuned_methods if x.method == reference}
  compared = [_compare(x, means.get(x.dataset)) for x in tuned_methods]
  adjusted = differences.holm([p for *_, p in compared])
  rows = []
  for x, (points, interval, p), holm in zip(
    tuned_methods, compared, adjusted, strict=True
  ):
    val = ", ".join(
      f"{lr:g}: " + ("diverged" if y is None else f"{100 * y:.1f}")
      for lr, y in sorted(x.val_accuracy.items())
    )
    rows.append(
      {
        "dataset": x.dataset,
        "method": x.method,
        "learning rate": markdown.NOTHING if x.lr is None else f"{x.lr:g}",
        "held-out accuracy by learning rate, %": val or markdown.NOTHING,
        "test accuracy, % (n)": _mean(x),
        f"minus {reference}, points": points,
        "95 % interval": differences.interval_text(interval),
        "p": differences.p_text(p),
        "p (Holm)": differences.p_text(holm),
      }
    )
  return markdown.table("llrlrrrrr", rows[0], [row.values() for row in rows])


def _mean(tuned):
  values, diverged = tuned.percent, tuned.num_diverged
  count = f"({len(values)}" + (f", {diverged} diverged)" if diverged else ")")
  if not values:
    return count if diverged else markdown.NOTHING
  deviation = tuned.deviation
  margin = "" if deviation is None else f" ± {deviation:.2f}"
  return f"{tuned.mean:.2f}{margin} {count}"


def _compare(tuned, reference):
  """Return difference with standard error, interval and p-value, if known."""
  points, unknown = markdown.NOTHING, ((math.nan, math.nan), math.nan)
  if reference is None or tuned is reference:
    return points, *unknown
  both = tuned, reference
  if any(x.num_diverged or not x.percent for x in both):
    return points, *unknown
  points = f"{tuned.mean - reference.mean:+.2f}"
  a, b = (x.percent for x in both)
  if min(len(a), len(b)) < 2:
    return points, *unknown
  error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b)))
  return f"{points} ± {error:.2f}", *differences.interval_and_p(a, b)


def write_csv(tuned_methods: Iterable[TunedMethod], path: pathlib.Path) -> None:
  """Write a row per run: phase `select` or `final`.

  The accuracy of a diverged run is empty.
  """
  rows: list[tuple[Any, ...]] = []
  header = ("dataset", "method", "phase", "base_lr", "seed", "accuracy")
  for x in tuned_methods:
    for lr, accuracy in sorted(x.val_accuracy.items()):
      rows.append((x.dataset, x.method, "select", lr, 0, accuracy))
    for seed, accuracy in sorted(x.test_accuracy.items()):
      rows.append((x.dataset, x.method, "final", x.lr, seed, accuracy))
  atomic_file.write(path, csv_text.table([header, *rows]))


def draw(tuned_methods: Sequence[TunedMethod]) -> figure_lib.Figure:
  """Draw the held-out and the test accuracies, a row per dataset.

  Methods of one norm share its color. A faint line marks LN's mean.
  """
  datasets = list(dict.fromkeys(x.dataset for x in tuned_methods))
  figure = figure_lib.Figure((9, 3.6 * len(datasets)), layout="constrained")
  axes = figure.subplots(len(datasets), 2, squeeze=False)
  for dataset, (left, right) in zip(datasets, axes, strict=True):
    shown = [x for x in tuned_methods if x.dataset == dataset]
    tested = [x for x in shown if x.test_accuracy]
    for x in shown:
      style = _style(x, tuned_methods)
      kept = {lr: y for lr, y in x.val_accuracy.items() if y is not None}
      lrs = sorted(kept)
      left.plot(
        lrs,
        [100 * kept[lr] for lr in lrs],
        label=plots.plain(x.method),
        **style,
      )
      if x.percent:
        right.errorbar(x.mean, tested.index(x), xerr=x.deviation, **style)
        if x.method == REFERENCE:
          right.axvline(x.mean, color="0.8", zorder=0)
    left.set_xscale("log", base=2)
    lrs = sorted({lr for x in shown for lr in x.val_accuracy})
    left.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    left.set_xlabel("learning rate")
    left.set_ylabel("accuracy on held-out images, %")
    left.set_title(plots.plain(f"{dataset}: selection"), loc="left")
    right.set_yticks(
      range(len(tested)),
      [
        plots.plain(f"{x.method} ({x.lr:g})")
        + (f", {x.num_diverged} diverged" if x.num_diverged else "")
        for x in tested
      ],
    )
    right.invert_yaxis()
    right.set_xlabel("test accuracy, % (bars: standard deviation)")
    right.set_title(plots.plain(f"{dataset}: test"), loc="left")
  plots.legend_below(axes[0, 0], 5, fontsize="small")
  return figure


def _style(tuned, tuned_methods):
  """Return a method's line style, the same for every dataset."""
  same_norm = dict.fromkeys(
    x.method for x in tuned_methods if x.norm == tuned.norm
  )
  index = list(same_norm).index(tuned.method)
  return {
    "color": plots.norm_color(tuned.norm),
    "marker": "osD^v"[index % 5],
    "linestyle": ("-", "--", ":", "-.", (0, (5, 1)))[index % 5],
    "markerfacecolor": "white" if index else None,
  }
