"""Write the results of `measure_gpu` as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rescalevit_jax.analysis import reference_results
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_results
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.runtime import markdown as markdown_lib

_number = markdown_lib.number

# Largest tolerated relative difference of a loss or of the gradient norm from
# the reference. bfloat16: three times the difference on a CPU, which is up to
# 0.34 % (ViT-B_16, ten norms, jax 0.10.2). float32: an eighth of it, since GPUs
# compute float32 products in TF32, with three bits more than bfloat16.
TOLERANCES = {"bfloat16": 0.01, "float32": 0.00125}
_LOSSES = ("loss", "second_loss", "eval_loss")


def compare(
  found: Mapping[str, float], reference: Mapping[str, float], dtype: str
) -> dict[str, Any]:
  """Compare a result of `norm_steps.prepare_check` with its reference.

  Returns:
    The largest relative differences `loss_difference` and
    `grad_norm_difference`, and `within`, True if the dtype tolerates both.
  """

  def difference(key):
    return abs(found[key] / reference[key] - 1)

  losses, grad_norm = list(map(difference, _LOSSES)), difference("grad_norm")
  most = TOLERANCES[dtype]
  return {
    "loss_difference": float(np.max(losses)),  # NaN if one is.
    "grad_norm_difference": grad_norm,
    "within": all(x <= most for x in (*losses, grad_norm)),
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
  plan: measure_plan.Plan,
  results: measure_results.Results,
  bounds: Sequence[Mapping[str, Any]],
) -> str:
  """Return summary.md; `bounds` are the rows of compiled.json."""
  machine = results.machine
  lines = [
    "# Measurements",
    "",
    f"- Devices: {machine['devices']}; {machine['cores']} cores of"
    f" {machine['processor']}",
    report_lib.versions(machine["versions"]),
    *(f"- Stage {x}: {results.state(x)}" for x in measure_results.STAGES),
    "",
    "## Norms",
    "",
    _norms(plan.norms, results["norms"], results.reference),
    "",
    "## Speed",
    "",
    _speed(plan.speed, results["speed"], machine, bounds),
    "",
    "## Training",
    "",
    _training(plan.training, results["training"]).rstrip(),
  ]
  problems = [
    f"- {name}: {x.get('error') or x['left_out']}"
    for name, x in results.items()
    if "error" in x or "left_out" in x
  ]
  if problems:
    lines += ["", "## Failed or skipped", "", *problems]
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

  def get(norm, kind="time", dtype="bfloat16", attention="auto"):
    return results.get(f"{kind} {norm} {dtype} {attention}", {})

  loss, step = _number("loss", "{:.4f}"), _number("step_seconds", "{:.1f}", 1e3)
  compilation = _number("compile_seconds", "{:.1f}")
  memory = _number("memory_bytes", "{:.1f}", 1e-9)
  columns = {
    "norm": str,
    "reference loss": lambda x: loss(reference["norms"].get(x, {})),
    "bfloat16: losses, gradient": lambda x: _differences(get(x, "check")),
    "float32: losses, gradient": lambda x: _differences(
      get(x, "check", "float32")
    ),
    "step, ms": lambda x: step(get(x)),
    "step with XLA's attention, ms": lambda x: step(get(x, attention="xla")),
    "compilation, s": lambda x: compilation(get(x)),
    "program, GB": lambda x: memory(get(x)),
    "finite": lambda x: _finite(get(x), get(x, attention="xla")),
  }
  names = dict.fromkeys(item["norm"] for item in items.values())
  return f"{intro}\n\n{markdown_lib.table_of('lrrrrrrrl', columns, names)}"


def _finite(*results):
  finite = [x["finite"] for x in results if "finite" in x]
  return ("yes" if all(finite) else "no") if finite else ""


def _differences(found):
  if "within" not in found:
    return ""
  mark = "" if found["within"] else " (too large)"
  return (
    f"{100 * found['loss_difference']:.3f} %,"
    f" {100 * found['grad_norm_difference']:.3f} %{mark}"
  )


def _speed(programs, results, machine, bounds):
  entries = [
    {"run": run, "subject": subject, "rounds": [results[name]]}
    for name, (run, subject) in programs.items()
    if measure_results.is_done(results.get(name))
  ]
  # Model and norm identify these programs; their other settings differ too.
  described = [
    {**comparison.describe(entry, entries), "settings": {}} for entry in entries
  ]
  text = report_lib.table(described)
  device = machine["devices"].partition(" x ")[2]
  pairs = [
    (entry, row)
    for entry in described
    for row in bounds
    if row["gpu_title"].startswith(device)
    and all(
      entry[key] == row[key]
      for key in ("subject", "norm", "model", "image_size", "batch", "dtype")
    )
  ]
  if pairs:
    step = _number("step_seconds", "{:.1f}", 1e3)
    columns = {
      "model": lambda x: x[0]["model"],
      "program": lambda x: report_lib.program(x[0]),
      "step, ms": lambda x: step(x[0]),
      "bound, ms": lambda x: step(x[1]),
      "step / bound": lambda x: (
        f"{x[0]['step_seconds'] / x[1]['step_seconds']:.2f}"
      ),
    }
    text += (
      "\nLower bounds of the compiled programs: each kernel takes its bytes at"
      " memory bandwidth or its products at peak speed.\n\n"
      + markdown_lib.table_of("llrrr", columns, pairs)
    )
  return text


def _training(runs, results):
  intro = (
    "Last: after the last step. Published: RescaleViT's result of the same"
    " recipe. Minutes include start-up and evaluation."
  )
  rows = []
  for name, run in runs.items():
    found = results.get(name, {})
    if not found.get("step"):
      continue
    published = reference_results.find(run.config)
    scores = {
      "name": name,
      "steps": f"{found['step']} of {run.config.total_steps}",
    }
    if accuracies := found["evaluations"]["accuracy"]:
      scores |= {"last": accuracies[-1], "best": max(accuracies)}
    if published and published.last_accuracy is not None:
      scores["published"] = published.last_accuracy
    if found["finished"]:
      scores |= {key: found[key] for key in ("images_per_second", "seconds")}
    rows.append(scores)
  columns = {
    "run": lambda x: x["name"],
    "steps": lambda x: x["steps"],
    "last accuracy, %": _number("last", factor=100),
    "best, %": _number("best", factor=100),
    "published last, %": _number("published", factor=100),
    "training images/s": _number("images_per_second", "{:.0f}"),
    "minutes": _number("seconds", "{:.1f}", 1 / 60),
  }
  return f"{intro}\n\n{markdown_lib.table_of('lrrrrrr', columns, rows)}"
