"""Differences of the norms' last accuracies from LN, with tests.

Groups that differ in the norm alone are compared with the group of LN: by a
paired t-test on the seeds that both have, if there are two or more, else by
Welch's t-test. Holm's correction covers all comparisons of a report.
"""

from collections.abc import Sequence
import dataclasses
import math

from scipy import stats

from rescalevit_jax.config import keys
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import markdown

REFERENCE = keys.KEYS["model.norm"].default
NOTE = (
  f"Means minus {REFERENCE}'s in the same setting. Paired t-tests use the seeds"
  " that both norms have, Welch's t-tests all runs. Holm's correction covers"
  " all rows of this table."
)
# Alignment and headings of the table of `cells`.
COLUMNS = (
  "llrrlrr",
  (
    "setting",
    "norm",
    f"minus {REFERENCE}, points",
    "95 % interval",
    "test",
    "p",
    "p (Holm)",
  ),
)


@dataclasses.dataclass(frozen=True)
class Difference:
  """The difference of a norm's mean last accuracy from LN's.

  Attributes:
    setting: all that both groups share and others may not.
    norm: the norm that is compared with LN.
    points: difference of the means in percentage points.
    interval: its 95 % interval.
    test: name of the test and number of runs.
    p: two-sided p-value, nan if nothing varies between seeds.
    adjusted_p: the same after Holm's correction.
  """

  setting: str
  norm: str
  points: float
  interval: tuple[float, float]
  test: str
  p: float
  adjusted_p: float = math.nan


def compare(study: run_groups.Study) -> list[Difference]:
  """Compare all groups of two runs or more with their groups of LN."""
  by_setting: dict[str, dict[str, tuple[run_reader.Run, ...]]] = {}
  for row, group in zip(tables.rows(study), study.groups, strict=True):
    names = [name for name in study.varied if name != "model.norm"]
    parts = [row["dataset"], row["model"], f"{row['resolution']} pixels"]
    if row["pretrained"] != "no":
      parts.append(f"pretrained: {row['pretrained']}")
    parts += [f"{name}={row[name]}" for name in names]
    setting = ", ".join(map(str, parts))
    by_setting.setdefault(setting, {})[row["norm"]] = group
  found = []
  for setting, groups in by_setting.items():
    reference = groups.pop(REFERENCE, ())
    for norm, group in groups.items():
      if min(len(group), len(reference)) >= 2:
        found.append(_difference(setting, norm, group, reference))
  adjusted = holm([x.p for x in found])
  return [
    dataclasses.replace(x, adjusted_p=p)
    for x, p in zip(found, adjusted, strict=True)
  ]


def _difference(setting, norm, group, reference):
  ours, theirs = (
    {run.config.seed: _percent(run) for run in runs}
    for runs in (group, reference)
  )
  shared = sorted(ours.keys() & theirs.keys())
  unique = len(ours) == len(group) and len(theirs) == len(reference)
  paired = unique and len(shared) >= 2
  if paired:
    a, b = ([x[seed] for seed in shared] for x in (ours, theirs))
    samples = [[x - y for x, y in zip(a, b, strict=True)]]
    test = f"paired, {len(shared)} seeds"
  else:
    samples = a, b = [list(map(_percent, x)) for x in (group, reference)]
    test = f"Welch, {len(a)} and {len(b)} runs"
  points = sum(a) / len(a) - sum(b) / len(b)
  # Rounding errors do not count as variation.
  if all(math.isclose(min(x), max(x), abs_tol=1e-9) for x in samples):
    return Difference(setting, norm, points, (math.nan,) * 2, test, math.nan)
  if paired:
    result = stats.ttest_rel(a, b)
  else:
    result = stats.ttest_ind(a, b, equal_var=False)
  low, high = map(float, result.confidence_interval())
  return Difference(
    setting, norm, points, (low, high), test, float(result.pvalue)
  )


def _percent(run):
  return 100 * run.result["last_accuracy"]


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjust p-values by Holm's step-down method (Holm 1979).

  Values that are nan stay so and do not count.
  """
  order = sorted(
    (i for i, p in enumerate(p_values) if not math.isnan(p)),
    key=lambda i: p_values[i],
  )
  adjusted, largest = [math.nan] * len(p_values), 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
    adjusted[i] = largest
  return adjusted


def cells(difference: Difference) -> list[str]:
  """Return the displayed row of a comparison."""
  low, high = difference.interval
  return [
    difference.setting,
    difference.norm,
    f"{difference.points:+.2f}",
    markdown.NOTHING if math.isnan(low) else f"{low:+.2f} to {high:+.2f}",
    difference.test,
    _p(difference.p),
    _p(difference.adjusted_p),
  ]


def _p(value):
  if math.isnan(value):
    return markdown.NOTHING
  return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
