"""Write the results of a speed benchmark as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax.sweep import grid

# Config keys that the table has columns for.
_COLUMNS = ("model_name", "model.norm", "image_size", "batch", "dtype")


def settings(
  config: ml_collections.ConfigDict,
  configs: Iterable[ml_collections.ConfigDict],
) -> dict[str, Any]:
  """Returns the keys in which configs differ, but for those of columns."""
  others = [config_lib.flatten(other) for other in configs]
  return {
    key: value
    for key, value in config_lib.flatten(config).items()
    if key not in _COLUMNS and any(value != other[key] for other in others)
  }


def is_first(run: grid.PlannedRun, runs: Sequence[grid.PlannedRun]) -> bool:
  """Return whether no earlier run differs from this one in the norm only."""

  def key(run):
    values = config_lib.flatten(run.config)
    return {k: v for k, v in values.items() if k != "model.norm"}

  return next(other for other in runs if key(other) == key(run)) is run


def markdown(report: Mapping[str, Any]) -> str:
  """Returns benchmark.md for what benchmark.json holds."""
  machine = report["machine"]
  versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
  lines = [
    "# Benchmark",
    "",
    f"- Command: `{report['command']}`",
    f"- Devices: {machine['devices']}; {machine['cores']} cores of"
    f" {machine['processor']}; load before: {machine['load_before'][0]:.1f}",
    f"- Versions: {versions}",
    "- Medians over the rounds; in brackets the lowest and the highest round."
    " A ratio is the median of the rounds' ratios of training images/s.",
    "- Peak: a large matrix product of random numbers in the same type and"
    " process. Arithmetic: the model's matrix products, 3 times those of a"
    " forward pass. Real data / resident: a step with its data, crops"
    " included, over one with a prepared batch that stays on the device. Peers"
    " train on such a batch, and classify it for evaluation, where ours goes"
    " through the test split. Compilation: of a peer, with its first step.",
    "- Ours asks for huge pages, as `rescalevit_jax.main` does; peers run as"
    " they come, unless GLIBC_TUNABLES was set for all.",
    "",
    *table(report["entries"]),
  ]
  diagnosed = [e for e in report["entries"] if "diagnostics_share" in e]
  if diagnosed:
    lines += [
      "",
      "What diagnostics take, in times of a training step in the same process:"
      " a look is the step with all that is measured around it, less the step."
      " Share: of all steps' time, with a look each `diagnostics_every` steps"
      f" and a sharpness each {diagnosed[0]['sharpness_every']:g} looks.",
      "",
      "| run | norm | a look | a sharpness | diagnostics_every | share |",
      "|---|---|--:|--:|--:|--:|",
    ]
  for e in diagnosed:
    lines.append(
      f"| {e['run']} | {e['norm']} | {e['look_steps']:.2f} |"
      f" {e['sharpness_steps']:.2f} | {e['diagnostics_every']:g} |"
      f" {100 * e['diagnostics_share']:.2f} % |"
    )
  if report["starts"]:
    lines += [
      "",
      "Seconds from a start to the first step, caches empty, then full:",
      "",
      "| run | first | second | third | second / first |",
      "|---|--:|--:|--:|--:|",
    ]
  for start in report["starts"]:
    second, third = start["warm"]
    lines.append(
      f"| {start['run']} | {start['cold']:.1f} | {second:.1f} | {third:.1f} |"
      f" {second / start['cold']:.2f} |"
    )
  return "\n".join(lines) + "\n"


def table(entries: Iterable[Mapping[str, Any]]) -> list[str]:
  """Return the lines of a table of what `speed.describe` returns."""
  lines = [
    "| model | batch, dtype | program | training images/s | step, ms"
    " (quartiles) | evaluation images/s | share of peak | real data / resident"
    " | memory, GB | compilation, s | ours / LN | ours / flax | ours / timm |",
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
  ]
  for e in entries:
    low, high = e["images_per_second_range"]
    ours = e["subject"] == "ours"
    cells = [
      f"{e['model']} at {e['image_size']}",
      f"{e['batch']}, {e['dtype']}",
      program(e),
      f"{e['images_per_second']:.0f} ({low:.0f}–{high:.0f})",
      f"{1e3 * e['step_seconds']:.1f} ({1e3 * e['step_seconds_low']:.1f}–"
      f"{1e3 * e['step_seconds_high']:.1f})",
      f"{e['eval_images_per_second']:.0f}",
      f"{100 * e['peak_share']:.0f} %" if ours else "",
      _cell(e, "input_ratio", 1),
      _cell(e, "memory_bytes", 1e-9),
      f"{e['compile_seconds']:.1f}",
      *(_cell(e, f"ratio_to_{what}", 1) for what in ("LN", "flax", "timm")),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def program(entry: Mapping[str, Any]) -> str:
  """Return what tells a program from others of the same model."""
  words = [entry["subject"], entry["norm"]]
  if entry["subject"] == "ours":
    words += [f"{k}={v}" for k, v in entry["settings"].items()]
  return ", ".join(words)


def _cell(entry, key, factor):
  return f"{factor * entry[key]:.2f}" if key in entry else ""
