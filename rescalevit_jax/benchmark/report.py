"""Write the results of a speed benchmark as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from rescalevit_jax.runtime import markdown as markdown_lib

_number = markdown_lib.number


def versions(found: Mapping[str, str]) -> str:
  """Return the versions of packages as an item of a list."""
  return f"- Versions: {', '.join(f'{k} {v}' for k, v in found.items())}"


def markdown(report: Mapping[str, Any]) -> str:
  """Return benchmark.md from the content of benchmark.json."""
  machine = report["machine"]
  lines = [
    "# Benchmark",
    "",
    f"- Command: `{report['command']}`",
    f"- Devices: {machine['devices']}; {machine['cores']} cores of"
    f" {machine['processor']}; load before: {machine['load_before'][0]:.1f}",
    versions(machine["versions"]),
    "- Medians over the rounds, with the minimum and the maximum in brackets."
    " A ratio is the median of the rounds' ratios of training images/s.",
    "- Share of peak: FLOPs of the model's matrix products, 3 times a"
    " forward pass, relative to the speed of a large random matrix product of"
    " the same type in the same process.",
    "- Real data / resident: time of a step with data loading and augmentation,"
    " relative to a step without them, on one batch that stays on the device."
    " Peers train and evaluate on a prepared batch; ours evaluates the test"
    " split.",
    "- Compilation of a peer includes its first step.",
    "- Ours uses the malloc settings of `rescalevit_jax.main`. Peers use"
    + (
      " the same."
      if report["same_malloc"]
      else " those of the environment, by default glibc's."
    ),
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
      markdown_lib.table_of("llrrrr", _DIAGNOSTICS, diagnosed).rstrip(),
    ]
  if report["starts"]:
    lines += [
      "",
      "Seconds from the start to the first step, with empty caches, then with"
      " full caches:",
      "",
      markdown_lib.table_of("lrrrr", _STARTS, report["starts"]).rstrip(),
    ]
  return "\n".join(lines) + "\n"


def table(entries: Iterable[Mapping[str, Any]]) -> str:
  """Return the table of entries of `comparison.describe`."""
  return markdown_lib.table_of("lll" + "r" * 10, _COLUMNS, entries)


def program(entry: Mapping[str, Any]) -> str:
  """Return subject, norm and distinctive settings of a program."""
  words = [entry["subject"], entry["norm"]]
  if entry["subject"] == "ours":
    words += [f"{k}={v}" for k, v in entry["settings"].items()]
  return ", ".join(words)


def _speed(entry):
  low, high = entry["images_per_second_range"]
  return f"{entry['images_per_second']:.0f} ({low:.0f}–{high:.0f})"


def _step(entry):
  low, high = entry["step_seconds_low"], entry["step_seconds_high"]
  return f"{1e3 * entry['step_seconds']:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"


_COLUMNS = {
  "model": lambda e: f"{e['model']} at {e['image_size']}",
  "batch, dtype": lambda e: f"{e['batch']}, {e['dtype']}",
  "program": program,
  "training images/s": _speed,
  "step, ms (quartiles)": _step,
  "evaluation images/s": _number("eval_images_per_second", "{:.0f}"),
  "share of peak": _number("peak_share", "{:.0f} %", 100),
  "real data / resident": _number("input_ratio"),
  "memory, GB": _number("memory_bytes", factor=1e-9),
  "compilation, s": _number("compile_seconds", "{:.1f}"),
  **{f"ours / {x}": _number(f"ratio_to_{x}") for x in ("LN", "flax", "timm")},
}
_DIAGNOSTICS = {
  "run": lambda e: e["run"],
  "norm": lambda e: e["norm"],
  "measurement": _number("measurement_steps"),
  "sharpness": _number("sharpness_steps"),
  "diagnostics_every": _number("diagnostics_every", "{:g}"),
  "share": _number("diagnostics_share", "{:.2f} %", 100),
}
_STARTS = {
  "run": lambda start: start["run"],
  "first": _number("cold", "{:.1f}"),
  "second": lambda start: f"{start['warm'][0]:.1f}",
  "third": lambda start: f"{start['warm'][1]:.1f}",
  "second / first": lambda start: f"{start['warm'][0] / start['cold']:.2f}",
}
