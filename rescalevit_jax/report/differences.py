"""Differences of the norms' last accuracies from LN, with tests.

Each group is compared with the group of LN that differs only in the norm. The
test is a paired t-test on the shared seeds, or Welch's t-test with fewer than
two shared seeds. Runs of one seed count as one, with their mean. Holm's
correction covers all comparisons of a report.
"""

from collections.abc import Sequence
import dataclasses
import math
import statistics

import numpy as np
from scipy import stats

from rescalevit_jax.config import keys
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import markdown

REFERENCE = keys.KEYS["model.norm"].default
NOTE = (
  f"Means minus {REFERENCE}'s in the same setting. Paired t-tests use the seeds"
  " that both norms have, Welch's t-tests all seeds. Runs of one seed are"
  " averaged. Holm's correction covers all tested rows. A comparison is not"
  " tested if a run of either norm diverged, because the remaining runs are a"
  " biased sample."
)


@dataclasses.dataclass(frozen=True)
class Difference:
  """The difference of a norm's mean last accuracy from LN's."""

  setting: str  # The settings that both groups share, without the norm.
  norm: str
  points: float  # Percentage points; nan if a run diverged.
  interval: tuple[float, float]  # 95 %; nan without variation between seeds.
  p: float  # Two-sided, of a t-test; nan without variation.
  test: str  # With the number of seeds.
  adjusted_p: float = math.nan  # By Holm's correction.


def compare(study: run_groups.Study) -> list[Difference]:
  """Compare all groups of two seeds or more with their groups of LN."""
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
      ours, theirs = _percent_by_seed(group), _percent_by_seed(reference)
      diverged = [
        f"{count} of {name}"
        for name, runs in ((norm, group), (REFERENCE, reference))
        if runs and (count := study.num_diverged(runs))
      ]
      if diverged and ours and theirs:
        unknown = math.nan, (math.nan, math.nan), math.nan
        reason = f"none, diverged: {', '.join(diverged)}"
        found.append(Difference(setting, norm, *unknown, reason))
      elif min(len(ours), len(theirs)) >= 2:
        found.append(_difference(setting, norm, ours, theirs))
  adjusted = holm([x.p for x in found])
  return [
    dataclasses.replace(x, adjusted_p=p)
    for x, p in zip(found, adjusted, strict=True)
  ]


def _difference(setting, norm, ours, theirs):
  shared = sorted(ours.keys() & theirs.keys())
  paired = len(shared) >= 2
  if paired:
    a, b = ([x[seed] for seed in shared] for x in (ours, theirs))
    test = f"paired, {len(shared)} seeds"
  else:
    a, b = list(ours.values()), list(theirs.values())
    test = f"Welch, {len(a)} and {len(b)} seeds"
  points = sum(a) / len(a) - sum(b) / len(b)
  return Difference(setting, norm, points, *interval_and_p(a, b, paired), test)


def _percent_by_seed(runs):
  """Return the mean last accuracy of each seed's runs."""
  found: dict[int, list[float]] = {}
  for run in runs:
    accuracy = 100 * run.result["last_accuracy"]
    found.setdefault(run.config.seed, []).append(accuracy)
  return {seed: statistics.fmean(values) for seed, values in found.items()}


def interval_and_p(
  a: Sequence[float], b: Sequence[float], paired: bool = False
) -> tuple[tuple[float, float], float]:
  """Return a 95 % interval of the means' difference, and the t-test's p-value.

  Both are nan if nothing varies. The test is Welch's unless the samples are
  paired.
  """
  samples = [np.subtract(a, b)] if paired else [a, b]
  # Rounding errors do not count as variation.
  if all(math.isclose(min(x), max(x), abs_tol=1e-9) for x in samples):
    return (math.nan, math.nan), math.nan
  if paired:
    result = stats.ttest_rel(a, b)
  else:
    result = stats.ttest_ind(a, b, equal_var=False)
  low, high = map(float, result.confidence_interval())
  return (low, high), float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjust p-values by Holm's step-down method (Holm 1979).

  Values that are nan stay so and do not count.
  """
  p = np.array(p_values, np.float64)
  order = np.argsort(p)  # nan is last.
  factors = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))
  adjusted = np.empty_like(p)
  adjusted[order] = np.maximum.accumulate(factors * p[order])
  return np.minimum(adjusted, 1.0).tolist()


def table(
  study: run_groups.Study,
) -> tuple[str, list[str], list[list[str]]]:
  """Return alignment, headings and cells of the displayed comparisons."""
  rows = [
    {
      "setting": x.setting,
      "norm": x.norm,
      f"minus {REFERENCE}, points": _points_text(x.points),
      "95 % interval": interval_text(x.interval),
      "test": x.test,
      "p": p_text(x.p),
      "p (Holm)": p_text(x.adjusted_p),
    }
    for x in compare(study)
  ]
  headings = list(rows[0]) if rows else []
  return "llrrlrr", headings, [list(row.values()) for row in rows]


def _points_text(points):
  return markdown.NOTHING if math.isnan(points) else f"{points:+.2f}"


def interval_text(interval: tuple[float, float]) -> str:
  """Return a displayed interval of percentage points."""
  low, high = interval
  return markdown.NOTHING if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"


def p_text(value: float) -> str:
  """Return a displayed p-value."""
  if math.isnan(value):
    return markdown.NOTHING
  return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
