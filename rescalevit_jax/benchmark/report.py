"""Write the results of a speed benchmark as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax.runtime import markdown as markdown_lib
from rescalevit_jax.sweep import grid

# Config keys with a column in the table.
_COLUMNS = ("model_name", "model.norm", "image_size", "batch", "dtype")


def settings(
  config: ml_collections.ConfigDict,
  configs: Iterable[ml_collections.ConfigDict],
) -> dict[str, Any]:
  """Return the keys without a column in which a config differs from others."""
  others = [config_lib.flatten(other) for other in configs]
  return {
    key: value
    for key, value in config_lib.flatten(config).items()
    if key not in _COLUMNS and any(value != other[key] for other in others)
  }


def is_first(run: grid.PlannedRun, runs: Sequence[grid.PlannedRun]) -> bool:
  """Return False if an earlier run differs in the norm only."""

  def key(run):
    values = config_lib.flatten(run.config)
    return {k: v for k, v in values.items() if k != "model.norm"}

  return next(other for other in runs if key(other) == key(run)) is run


def markdown(report: Mapping[str, Any]) -> str:
  """Return benchmark.md from the content of benchmark.json."""
  machine = report["machine"]
  versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
  lines = [
    "# Benchmark",
    "",
    f"- Command: `{report['command']}`",
    f"- Devices: {machine['devices']}; {machine['cores']} cores of"
    f" {machine['processor']}; load before: {machine['load_before'][0]:.1f}",
    f"- Versions: {versions}",
    "- Medians over the rounds, with the minimum and the maximum in brackets."
    " A ratio is the median of the rounds' ratios of training images/s.",
    "- Share of peak: FLOPs of the model's matrix products, 3 times a"
    " forward pass, relative to the speed of a large random matrix product of"
    " the same type in the same process.",
    "- Real data / resident: time of a step with data loading and augmentation,"
    " relative to a step on a prepared batch that stays on the device. Peers"
    " train and evaluate on such a batch; ours evaluates the test split.",
    "- Compilation of a peer includes its first step.",
    "- Ours uses huge pages, as `rescalevit_jax.main` does. Peers use the"
    " defaults, unless GLIBC_TUNABLES was set for all.",
    "",
    table(report["entries"]).rstrip(),
  ]
  diagnosed = [e for e in report["entries"] if "diagnostics_share" in e]
  if diagnosed:
    lines += [
      "",
      "Cost of diagnostics, in training steps of the same process. One"
      " measurement costs a step with all measurements around it, minus the"
      " step. Share: fraction of the training time, with a measurement every"
      " diagnostics_every steps and a sharpness estimate every"
      f" {diagnosed[0]['sharpness_every']:g} measurements.",
      "",
      markdown_lib.table(
        "llrrrr",
        [
          "run",
          "norm",
          "measurement",
          "sharpness",
          "diagnostics_every",
          "share",
        ],
        [
          [
            e["run"],
            e["norm"],
            f"{e['measurement_steps']:.2f}",
            f"{e['sharpness_steps']:.2f}",
            f"{e['diagnostics_every']:g}",
            f"{100 * e['diagnostics_share']:.2f} %",
          ]
          for e in diagnosed
        ],
      ).rstrip(),
    ]
  if report["starts"]:
    lines += [
      "",
      "Seconds from the start to the first step, with empty caches, then with"
      " full caches:",
      "",
      markdown_lib.table(
        "lrrrr",
        ["run", "first", "second", "third", "second / first"],
        [
          [
            start["run"],
            *(f"{x:.1f}" for x in (start["cold"], *start["warm"])),
            f"{start['warm'][0] / start['cold']:.2f}",
          ]
          for start in report["starts"]
        ],
      ).rstrip(),
    ]
  return "\n".join(lines) + "\n"


def table(entries: Iterable[Mapping[str, Any]]) -> str:
  """Return the table of entries of `comparison.describe`."""
  headings = [
    "model",
    "batch, dtype",
    "program",
    "training images/s",
    "step, ms (quartiles)",
    "evaluation images/s",
    "share of peak",
    "real data / resident",
    "memory, GB",
    "compilation, s",
    "ours / LN",
    "ours / flax",
    "ours / timm",
  ]
  return markdown_lib.table("lll" + "r" * 10, headings, map(_row, entries))


def _row(e):
  low, high = e["images_per_second_range"]
  return [
    f"{e['model']} at {e['image_size']}",
    f"{e['batch']}, {e['dtype']}",
    program(e),
    f"{e['images_per_second']:.0f} ({low:.0f}–{high:.0f})",
    f"{1e3 * e['step_seconds']:.1f} ({1e3 * e['step_seconds_low']:.1f}–"
    f"{1e3 * e['step_seconds_high']:.1f})",
    f"{e['eval_images_per_second']:.0f}",
    f"{100 * e['peak_share']:.0f} %" if e["subject"] == "ours" else "",
    _cell(e, "input_ratio", 1),
    _cell(e, "memory_bytes", 1e-9),
    f"{e['compile_seconds']:.1f}",
    *(_cell(e, f"ratio_to_{other}", 1) for other in ("LN", "flax", "timm")),
  ]


def program(entry: Mapping[str, Any]) -> str:
  """Return subject, norm and distinctive settings of a program."""
  words = [entry["subject"], entry["norm"]]
  if entry["subject"] == "ours":
    words += [f"{k}={v}" for k, v in entry["settings"].items()]
  return ", ".join(words)


def _cell(entry, key, factor):
  return f"{factor * entry[key]:.2f}" if key in entry else ""
