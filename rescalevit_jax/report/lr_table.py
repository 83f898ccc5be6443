"""Methods, each at its own learning rate: as a table, a file and a picture."""

from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import pathlib
import statistics

from matplotlib import figure as figure_lib
from scipy import stats

from rescalevit_jax.analysis import plots

# The others' differences are those from it.
REFERENCE = "LN"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a method on a data set.

  A run that diverged, whose loss was not finite, has None.

  Attributes:
    dataset: its name.
    method: its name.
    norm: its model's.
    tried: accuracy on the held-out images, a fraction, by learning rate.
    rate: the learning rate chosen; None: each diverged.
    tested: accuracy on the test images after the last step, by seed.
  """

  dataset: str
  method: str
  norm: str
  tried: Mapping[float, float | None]
  rate: float | None
  tested: Mapping[int, float | None] = dataclasses.field(default_factory=dict)

  @property
  def percent(self) -> list[float]:
    """Test accuracies, in percent, of the runs that did not diverge."""
    return [100 * x for x in self.tested.values() if x is not None]


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the outcome in Markdown.

  The difference from LN is that of the means; its standard error is
  sqrt(s1^2 / n1 + s2^2 / n2), and p that of Welch's t-test, two-sided. There
  is none where a run diverged.
  """
  lines = [
    "| data set | method | rate | held-out accuracy by rate, % | test accuracy,"
    " % (n) | difference from LN, points | p |",
    "| --- | --- | --: | --- | --: | --: | --: |",
  ]
  for x in outcomes:
    tried = ", ".join(
      f"{rate:g}: " + ("diverged" if y is None else f"{100 * y:.1f}")
      for rate, y in sorted(x.tried.items())
    )
    rate = "–" if x.rate is None else f"{x.rate:g}"
    lines.append(
      f"| {x.dataset} | {x.method} | {rate} | {tried} | {_mean(x)} |"
      f" {_difference(x, outcomes)} |"
    )
  return "\n".join(lines) + "\n"


def _mean(outcome):
  values, diverged = outcome.percent, len(outcome.tested) - len(outcome.percent)
  count = f"({len(values)}" + (f", {diverged} diverged)" if diverged else ")")
  if not values:
    return count if diverged else "–"
  spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
  return f"{statistics.fmean(values):.2f}{spread} {count}"


def _difference(outcome, outcomes):
  """Returns the last two cells of a row."""
  both = [outcome] + [
    x for x in outcomes if (x.dataset, x.method) == (outcome.dataset, REFERENCE)
  ]
  values = [x.percent for x in both]
  if outcome is both[-1] or any(
    not x.percent or len(x.percent) < len(x.tested) for x in both
  ):
    return "– | –"
  text = f"{statistics.fmean(values[0]) - statistics.fmean(values[1]):+.2f}"
  if min(map(len, values)) < 2:
    return f"{text} | –"
  error = sum(statistics.variance(x) / len(x) for x in values) ** 0.5
  if not error:
    return f"{text} ± 0 | –"
  p = stats.ttest_ind(*values, equal_var=False).pvalue
  return f"{text} ± {error:.2f} | {p:.2g}"


def write_csv(outcomes: Iterable[Outcome], path: pathlib.Path) -> None:
  """Writes a line for each run: phase `select` or `final`.

  The accuracy of one that diverged is empty.
  """
  with open(path, "w", encoding="utf-8", newline="") as f:
    writer = csv.writer(f, lineterminator="\n")
    writer.writerow(
      ["dataset", "method", "phase", "base_lr", "seed", "accuracy"]
    )
    for x in outcomes:
      for rate, accuracy in sorted(x.tried.items()):
        writer.writerow([x.dataset, x.method, "select", rate, 0, accuracy])
      for seed, accuracy in sorted(x.tested.items()):
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
    tested = [x for x in shown if x.percent]
    for x in shown:
      style = _style(x, outcomes)
      rates = sorted(rate for rate, y in x.tried.items() if y is not None)
      left.plot(
        rates, [100 * x.tried[r] for r in rates], label=x.method, **style
      )
      if x in tested:
        spread = statistics.stdev(x.percent) if len(x.percent) > 1 else None
        mean = statistics.fmean(x.percent)
        right.errorbar(mean, tested.index(x), xerr=spread, **style)
        if x.method == REFERENCE:
          right.axvline(mean, color="0.8", zorder=0)
    left.set_xscale("log", base=2)
    rates = sorted({rate for x in shown for rate in x.tried})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.set_xlabel("learning rate")
    left.set_ylabel("accuracy on held-out images, %")
    left.set_title(f"{dataset}: choosing", loc="left")
    right.set_yticks(
      range(len(tested)), [f"{x.method} ({x.rate:g})" for x in tested]
    )
    right.invert_yaxis()
    right.set_xlabel("test accuracy, % (bars: standard deviation)")
    right.set_title(f"{dataset}: testing", loc="left")
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc="outside lower center",
    fontsize="small",
    frameon=False,
    ncols=5,
  )
  return figure


def _style(outcome, outcomes):
  """Returns how a method is drawn, with every data set alike."""
  of_norm = dict.fromkeys(x.method for x in outcomes if x.norm == outcome.norm)
  place = list(of_norm).index(outcome.method)
  return {
    "color": plots.norm_color(outcome.norm),
    "marker": "osD^v"[place % 5],
    "linestyle": ("-", "--", ":", "-.", (0, (5, 1)))[place % 5],
    "markerfacecolor": "white" if place else None,
  }
