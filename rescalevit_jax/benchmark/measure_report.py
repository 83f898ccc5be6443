"""Write the results of `measure_gpu` as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rescalevit_jax.analysis import reference_results
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.runtime import markdown as markdown_lib
from rescalevit_jax.sweep import grid

# Largest tolerated relative difference of a loss or of the gradient norm from
# the reference. bfloat16: three times the difference on a CPU, which is up to
# 0.34 % (ViT-B_16, ten norms, jax 0.10.2). float32: an eighth of it, since GPUs
# compute float32 products in TF32, with three bits more than bfloat16.
TOLERANCES = {"bfloat16": 0.01, "float32": 0.00125}
_LOSSES = ("loss", "second_loss", "eval_loss")


def compare(
  found: Mapping[str, float], reference: Mapping[str, float], dtype: str
) -> dict[str, Any]:
  """Return the largest relative differences from a reference.

  Args:
    found: result of `norm_steps.prepare_check`.
    reference: the same on a CPU in float32.
    dtype: a key of `TOLERANCES`.

  Returns:
    `loss_difference`, `grad_norm_difference`, and `within`, True if both are
    within the tolerance.
  """

  def difference(key):
    return abs(found[key] / reference[key] - 1)

  loss, grad_norm = max(map(difference, _LOSSES)), difference("grad_norm")
  most = TOLERANCES[dtype]
  return {
    "loss_difference": loss,
    "grad_norm_difference": grad_norm,
    "within": loss <= most and grad_norm <= most,
  }


def brief(found: Mapping[str, Any]) -> str:
  """Return a short description of a result, for the log."""
  for key in ("error", "left_out"):
    if key in found:
      return f"{key.replace('_', ' ')}: {found[key]}"
  if "within" in found:
    word = "within" if found["within"] else "OUTSIDE"
    return f"{100 * found['loss_difference']:.3f} % off, {word} the tolerance"
  if "images_per_second" in found:
    return f"{found['images_per_second']:.0f} images/s"
  if "step" in found:
    return f"step {found['step']}"
  return f"loss {found['loss']:.4f}, without a reference"


def markdown(
  machine: Mapping[str, Any],
  states: Mapping[str, str],
  items: Mapping[str, Mapping[str, str]],
  norms: Mapping[str, Mapping[str, Any]],
  reference: Mapping[str, Any],
  entries: Sequence[Mapping[str, Any]],
  bounds: Sequence[Mapping[str, Any]],
  runs: Mapping[str, grid.PlannedRun],
  training: Mapping[str, Mapping[str, Any]],
  problems: Mapping[str, str],
) -> str:
  """Return summary.md.

  Args:
    machine: result of `machine.describe`.
    states: progress of each stage, as text.
    items: items of the stage `norms`, by name.
    norms: their results.
    reference: content of reference.json.
    entries: entries for `comparison.describe`.
    bounds: rows of compiled.json.
    runs: runs of the stage `training`, by name.
    training: their results.
    problems: reasons for failed or skipped measurements, by name.
  """
  versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
  lines = [
    "# Measurements",
    "",
    f"- Devices: {machine['devices']}; {machine['cores']} cores of"
    f" {machine['processor']}",
    f"- Versions: {versions}",
    *(f"- Stage {stage}: {state}" for stage, state in states.items()),
    "",
    "## Norms",
    "",
    _norms(items, norms, reference),
    "",
    "## Speed",
    "",
    _speed(machine, entries, bounds),
    "",
    "## Training",
    "",
    _training(runs, training).rstrip(),
  ]
  if problems:
    lines += ["", "## Failed or skipped", ""]
    lines += [f"- {name}: {why}" for name, why in problems.items()]
  return "\n".join(lines) + "\n"


def _norms(items, results, reference):
  tolerances = ", ".join(
    f"{dtype} {100 * most:g} %" for dtype, most in TOLERANCES.items()
  )
  intro = (
    f"{reference['model_name']} at {reference['image_size']} on"
    f" {reference['images']} images without dropout. Differences are relative"
    " to a CPU in float32: the largest of the losses of step 1, step 2 and an"
    " evaluation after both, and the first gradient's norm. Tolerances:"
    f" {tolerances}. Then the recipe's step in bfloat16; several were compiled"
    " concurrently."
  )
  headings = [
    "norm",
    "reference loss",
    "bfloat16: losses, gradient",
    "float32: losses, gradient",
    "step, ms",
    "step with XLA's attention, ms",
    "compilation, s",
    "program, GB",
    "finite",
  ]
  rows = []
  for norm in dict.fromkeys(item["norm"] for item in items.values()):

    def get(kind, dtype, attention, norm=norm):
      return results.get(f"{kind} {norm} {dtype} {attention}", {})

    loss = reference["norms"].get(norm, {}).get("loss")
    auto = get("time", "bfloat16", "auto")
    xla = get("time", "bfloat16", "xla")
    finite = {x["finite"] for x in (auto, xla) if "finite" in x}
    rows.append(
      [
        norm,
        "" if loss is None else f"{loss:.4f}",
        _differences(get("check", "bfloat16", "auto")),
        _differences(get("check", "float32", "auto")),
        _cell(auto, "step_seconds", 1e3),
        _cell(xla, "step_seconds", 1e3),
        _cell(auto, "compile_seconds", 1),
        _cell(auto, "memory_bytes", 1e-9),
        "no" if False in finite else "yes" if finite else "",
      ]
    )
  return f"{intro}\n\n{markdown_lib.table('lrrrrrrrl', headings, rows)}"


def _differences(found):
  if "within" not in found:
    return ""
  mark = "" if found["within"] else " (too large)"
  return (
    f"{100 * found['loss_difference']:.3f} %,"
    f" {100 * found['grad_norm_difference']:.3f} %{mark}"
  )


def _speed(machine, entries, bounds):
  # Model and norm identify these programs; their other settings differ too.
  described = [
    {**comparison.describe(entry, entries), "settings": {}} for entry in entries
  ]
  text = report_lib.table(described)
  device = machine["devices"].partition(" x ")[2]
  rows = [
    [
      entry["model"],
      report_lib.program(entry),
      f"{1e3 * entry['step_seconds']:.1f}",
      f"{1e3 * row['step_seconds']:.1f}",
      f"{entry['step_seconds'] / row['step_seconds']:.2f}",
    ]
    for entry in described
    for row in bounds
    if row["gpu_title"].startswith(device)
    and all(
      entry[key] == row[key]
      for key in ("subject", "norm", "model", "image_size", "batch", "dtype")
    )
  ]
  if rows:
    headings = ["model", "program", "step, ms", "bound, ms", "step / bound"]
    text += (
      "\nLower bounds of the compiled programs: each kernel takes its bytes at"
      " memory bandwidth or its products at peak speed.\n\n"
      + markdown_lib.table("llrrr", headings, rows)
    )
  return text


def _training(runs, results):
  intro = (
    "Last: after the last step. Published: RescaleViT's result of the same"
    " recipe. Minutes include start-up and evaluation."
  )
  headings = [
    "run",
    "steps",
    "last accuracy, %",
    "best, %",
    "published last, %",
    "training images/s",
    "minutes",
  ]
  rows = []
  for name, run in runs.items():
    found = results.get(name)
    if not found or not found.get("step"):
      continue
    accuracy = found["evaluations"]["accuracy"]
    published = reference_results.find(run.config)
    last = published and published.last_accuracy
    rows.append(
      [
        name,
        f"{found['step']} of {run.config.total_steps}",
        f"{100 * accuracy[-1]:.2f}" if accuracy else "",
        f"{100 * max(accuracy):.2f}" if accuracy else "",
        "" if last is None else f"{100 * last:.2f}",
        f"{found['images_per_second']:.0f}" if found["finished"] else "",
        f"{found['seconds'] / 60:.1f}" if found["finished"] else "",
      ]
    )
  return f"{intro}\n\n{markdown_lib.table('lrrrrrr', headings, rows)}"


def _cell(found, key, factor):
  return f"{factor * found[key]:.1f}" if key in found else ""
