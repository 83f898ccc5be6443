"""Tabulate the results of many runs: a row per recipe, over all its seeds."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import statistics
from typing import Any

from rescalevit_jax import config as config_lib
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.config import keys
from rescalevit_jax.report import run_groups
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import csv_text
from rescalevit_jax.runtime.markdown import NOTHING
from rescalevit_jax.training import scores


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the displayed table."""

  heading: str
  key: str  # Of the row's value, for sorting.
  text: Callable[[dict[str, Any]], str]  # From a row to the displayed text.
  numeric: bool = True


def rows(study: run_groups.Study) -> list[dict[str, Any]]:
  """Return a row of values for each group.

  Accuracies are fractions. A missing value, such as the standard deviation of a
  single run, is None.
  """
  return [_row(study, group) for group in study.groups]


def run_rows(study: run_groups.Study) -> list[dict[str, Any]]:
  """Return a row for each readable run, finished runs first."""
  varied = run_groups.varied_keys(run.config for run in study.runs)
  return [_run_row(study.name(run), run, varied) for run in study.runs]


def columns(study: run_groups.Study) -> list[Column]:
  """Return the columns of the displayed table."""

  def value(heading, key, form=str, numeric=True):
    def cell(row):
      return NOTHING if row[key] is None else form(row[key])

    return Column(heading, key, cell, numeric)

  def accuracy(heading, key):
    def cell(row):
      return _mean_and_sd(row[f"{key}_mean"], row[f"{key}_sd"])

    return Column(heading, f"{key}_mean", cell)

  def interval(row):
    low, high = row["last_accuracy_low"], row["last_accuracy_high"]
    return NOTHING if low is None else f"{_percent(low)} to {_percent(high)}"

  def runs(row):
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return f"{row['runs']}{diverged}"

  names = ("dataset", "model", "norm", "pretrained")
  result = [value(key, key, numeric=False) for key in names]
  result.append(value("resolution", "resolution"))
  for key in study.varied:
    kind = keys.KEYS[key].optional or type(keys.KEYS[key].default)
    result.append(value(key, key, numeric=kind in (int, float)))
  result += [
    Column("runs (n)", "runs", runs),
    accuracy("best accuracy, %", "best_accuracy"),
    accuracy("last accuracy, %", "last_accuracy"),
    Column("95 % interval", "last_accuracy_low", interval),
    value("last test loss", "last_loss_mean", "{:.3f}".format),
    value("minutes", "minutes_mean", _short),
    value("images/s", "images_per_second_mean", _short),
    value("parameters, M", "parameters", lambda x: _short(x / 1e6)),
  ]
  if any(reference_results.find(group[0].config) for group in study.groups):
    result += [
      value("published best, %", "published_best_accuracy", _percent),
      value("published last, %", "published_last_accuracy", _percent),
      value("difference, best", "best_accuracy_difference", _points),
      value("difference, last", "last_accuracy_difference", _points),
    ]
  return result


def cells(
  columns: Sequence[Column], rows: Sequence[dict[str, Any]]
) -> tuple[str, list[str], list[list[str]]]:
  """Return the alignment, headings and cells of the displayed table."""
  return (
    "".join("r" if column.numeric else "l" for column in columns),
    [column.heading for column in columns],
    [[column.text(row) for column in columns] for row in rows],
  )


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
  """Return the rows as CSV with full precision; None becomes empty."""
  header = [rows[0].keys()] if rows else []
  return csv_text.table([*header, *(row.values() for row in rows)])


def devices(run: run_reader.Run) -> str:
  """Return the devices of a finished run, such as '1 x NVIDIA H100'."""
  result = run.result or {}
  counts = collections.Counter(map(str, result.get("devices", ())))
  return ", ".join(f"{n} x {kind}" for kind, n in counts.items()) or "unknown"


def versions(run: run_reader.Run) -> str:
  """Return the versions of a finished run: 'python 3.11.2, jax 0.10.2, …'."""
  result = run.result or {}
  items = result.get("versions", {}).items()
  return ", ".join(f"{name} {version}" for name, version in items) or "unknown"


def left_out(study: run_groups.Study) -> list[tuple[str, list[str]]]:
  """Return the runs outside all means: titles, each with a line per run."""

  def line(run, reason):
    step = f"{study.name(run)}: step {run.step} of {run.config.total_steps}"
    return f"{step}; {reason}" if reason.startswith("error: ") else step

  sections = [
    (
      "Diverged",
      [line(x, f"error: {(x.result or {})['error']}") for x in study.diverged],
    ),
    (
      "Unfinished",
      [line(x, run_reader.last_log_line(x.workdir)) for x in study.unfinished],
    ),
    ("Not begun", list(study.not_begun)),
    ("Damaged", list(study.damaged)),
  ]
  return [(title, items) for title, items in sections if items]


def _naming(config, varied):
  values = config_lib.flatten(config)
  return {
    "dataset": config.dataset,
    "model": config.model_name,
    "norm": config.model.norm,
    "pretrained": run_groups.pretrained(config),
    "resolution": config.image_size,
    **{key: values[key] for key in varied},
  }


def _row(study, group):
  config = group[0].config
  row = _naming(config, study.varied)
  row |= {"runs": len(group), "diverged": study.num_diverged(group)}

  def add(name, values):
    row[f"{name}_mean"] = statistics.fmean(values) if values else None
    row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None

  for key in ("best_accuracy", "last_accuracy", "last_loss"):
    add(key, [run.result[key] for run in group])
  add("minutes", [run.result["seconds"] / 60 for run in group])
  # 0 if nothing was measured, as in a run of very few steps.
  speeds = [run.result["images_per_second"] for run in group]
  add("images_per_second", [speed for speed in speeds if speed > 0])
  row["parameters"] = group[0].result["parameters"]
  figures = reference_results.find(config)
  for key in ("best_accuracy", "last_accuracy"):
    theirs = getattr(figures, key, None)
    row[f"published_{key}"] = theirs
    row[f"{key}_difference"] = (
      None if theirs is None else row[f"{key}_mean"] - theirs
    )
  row |= _interval(row["last_accuracy_mean"], group[0].result)
  row["published_minutes"] = getattr(figures, "minutes", None)
  return row


def _interval(accuracy, result):
  """Return the 95 % interval of a last accuracy; None if unknown.

  A best accuracy has none: it is selected on the same test images.
  """
  examples = result.get("examples_evaluated")
  low = high = None
  if examples and accuracy is not None:
    low, high = scores.wilson_interval(accuracy * examples, examples)
  return {"last_accuracy_low": low, "last_accuracy_high": high}


def _run_row(name, run, varied):
  result = run.result or {}
  finished = run.is_finished
  return {
    "run": name,
    **_naming(run.config, varied),
    "seed": run.config.seed,
    "state": result.get("status", "unfinished"),
    "step": run.step,
    "total_steps": run.config.total_steps,
    **{
      key: result.get(key)
      for key in ("best_accuracy", "best_step", "last_accuracy", "last_loss")
    },
    **_interval(result.get("last_accuracy"), result),
    "minutes": result["seconds"] / 60 if finished else None,
    "images_per_second": result.get("images_per_second") or None,
    "parameters": result.get("parameters"),
    "devices": devices(run) if finished else None,
    "versions": versions(run) if finished else None,
  }


def _short(number):
  return f"{number:.{2 if number < 10 else 1 if number < 1000 else 0}f}"


def _percent(fraction):
  return f"{100 * fraction:.1f}"


def _points(fraction):
  text = f"{100 * fraction:+.1f}".replace("-", "−")
  return "0.0" if text[1:] == "0.0" else text


def _mean_and_sd(mean, sd):
  text = _percent(mean)
  if sd is None:
    return text
  sd *= 100
  return f"{text} ± {sd:.{2 if sd < 1 else 1}f}"
