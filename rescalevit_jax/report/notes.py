"""Describe the table of a report in a few sentences."""

import collections
from collections.abc import Iterable

from rescalevit_jax.analysis import reference_results
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables


def describe(study: run_groups.Study) -> list[str]:
  """Return the notes on a study: counts, definitions, hardware, versions."""
  finished = study.finished
  others = {
    "diverged": study.diverged,
    "unfinished": study.unfinished,
    "not begun": study.not_begun,
    "damaged": study.damaged,
  }
  notes = [
    f"{_count(len(finished), 'finished run')} of"
    f" {_count(len(study.groups), 'recipe')}; "
    + ", ".join(f"{len(runs)} {state}" for state, runs in others.items())
    + "."
  ]
  if not finished:
    return notes
  notes += [
    "Accuracy is test accuracy: mean ± standard deviation (n − 1) of n runs"
    " that differ only in the seed. A single run has no deviation.",
    "Best is the highest accuracy of all evaluations of a run, so it is"
    " selected on the test set. Last is the accuracy after the last step.",
    "The 95 % interval (Wilson) of the mean last accuracy covers the sampling"
    " of test images, not the variation between seeds.",
    "Minutes include compilation and periodic evaluations. They exclude loading"
    " the dataset and the final evaluation. Images/s cover training only.",
  ]
  published = [reference_results.find(g[0].config) for g in study.groups]
  publishers = {figures.publisher for figures in published if figures}
  if "RescaleViT" in publishers:
    notes.append(
      "Published figures are from the logs of RescaleViT: one run each, the"
      " best of 200 evaluations, one RTX 3090, fp16."
    )
  if "Google" in publishers:
    notes.append(
      "Published figures of fine-tuning at 384 pixels are from Google's README,"
      " which gives one accuracy a run. Google evaluates whole batches only:"
      " 9,728 of 10,000 test images in batches of 512."
    )
  if publishers:
    notes.append(
      "Difference: our mean minus the published figure, in percentage points. A"
      " run from MODEL.npz is assumed to start from Google's ImageNet-21k"
      " weights."
    )
  for group in study.groups:
    seeds = [run.config.seed for run in group]
    if len(set(seeds)) < len(seeds):
      names = ", ".join(study.name(run) for run in group)
      notes.append(f"Runs that share a seed, each counted: {names}.")
    results = [run.result or {} for run in group]
    dtypes = {x["dtype"] for x in results if "dtype" in x}
    if len(dtypes) > 1 or any(" then " in x for x in dtypes):
      notes.append(
        f"{study.name(group[0])} and its other seeds ran in several dtypes:"
        f" {', '.join(sorted(dtypes))}."
      )
  notes.append(f"Hardware: {_tally(map(tables.devices, finished))}.")
  notes.append(f"Software: {_tally(map(tables.versions, finished))}.")
  return notes


def _tally(descriptions: Iterable[str]) -> str:
  """Return 'A (3 runs); B (1 run)', or 'A' if all are equal."""
  counts = collections.Counter(descriptions)
  if len(counts) == 1:
    return next(iter(counts))
  return "; ".join(f"{text} ({_count(n, 'run')})" for text, n in counts.items())


def _count(n, noun):
  return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
