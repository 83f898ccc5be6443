"""Predict memory and time of training on absent GPUs by compiling for them.

Reports for each config and GPU the memory of a step, kernels, bytes, FLOPs and
a lower bound of the step time. Nothing is executed.
"""

from collections.abc import Callable, Iterator, Sequence
import importlib.metadata
import logging
import os
import time
from typing import Any

import jax
import ml_collections

from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import gpu_compile
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import hlo
from rescalevit_jax.benchmark import memory
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import traits
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.runtime import markdown as markdown_lib
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import grid
from rescalevit_jax.training import experiment

_log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
_DEFAULT_SHARE = "0.75"  # JAX's default share of GPU memory.


def forecast(
  runs: Sequence[grid.PlannedRun],
  targets: Sequence[gpus.Gpu],
  *,
  devices: int,
  with_peer: bool,
) -> Iterator[dict[str, Any]]:
  """Compile every run for every GPU.

  After each program, yield the content of compiled.json, one dictionary that
  grows.

  Args:
    runs: the runs.
    targets: the GPUs.
    devices: number of GPUs on one host, which share each batch.
    with_peer: True to add a plain flax ViT for each model.

  Raises:
    UserError: the compiler's wheels are missing, or a config is unsuitable.
  """
  jax.config.update("jax_platforms", "cpu")  # Do not occupy a present GPU.
  jobs = [
    (gpu, run.config, subject)
    for gpu in targets
    for run in runs
    for subject in (("ours", "flax") if with_peer else ("ours",))
    # A peer always has LayerNorm: compile it once per model.
    if subject == "ours" or comparison.is_first(run, runs)
  ]
  configs = [run.config for run in runs]
  rows: list[dict[str, Any]] = []
  report = {
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "devices": devices,
    "memory_share": _memory_share(),
    "programs": len(jobs),
    "rows": rows,
  }
  start = time.monotonic()
  for i, (gpu, config, subject) in enumerate(jobs, 1):
    row = _compile(gpu, config, subject, devices)
    row["settings"] = comparison.settings(config, configs)
    rows.append(row)
    _log.info(
      "%d/%d  %s  %s: %.1f GB, at least %.1f ms  ETA %s",
      i,
      len(jobs),
      gpu.title,
      report_lib.program(row),
      row["memory_bytes"] / 1e9,
      row["step_seconds"] * 1e3,
      terminal.duration((time.monotonic() - start) / i * (len(jobs) - i)),
    )
    yield report


def _memory_share() -> float:
  """Return the share of GPU memory that JAX allocates."""
  return float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or _DEFAULT_SHARE)


def _compile(
  gpu: gpus.Gpu, config: ml_collections.ConfigDict, subject: str, devices: int
) -> dict[str, Any]:
  """Return the row of one program."""
  start = time.monotonic()
  if subject == "ours":
    inputs = gpu_compile.inputs_of(config)
    needed, program, launches = _train_step(config, gpu, inputs, devices)
  else:
    step = gpu_compile.flax_train_step(config, gpu, devices)
    needed, program, launches = _read(step)
  seconds = time.monotonic() - start
  limit = _memory_share() * gpu.memory_bytes
  with accelerator.compiling_for(gpu.accelerator):
    model = experiment.create_model(config, num_classes=1)
  row = {
    "gpu": gpu.name,
    "gpu_title": gpu.title,
    "subject": subject,
    "norm": config.model.norm if subject == "ours" else "LN",
    "model": config.model_name,
    "image_size": config.image_size,
    "batch": config.batch,
    "dtype": model.config.dtype,
    "attention": model.config.attention if subject == "ours" else "xla",
    "memory_bytes": needed,
    "memory_limit_bytes": limit,
    "fits": needed <= limit,
    "kernels": len(program.kernels),
    "launches": launches,
    "gemms": program.gemms,
    "kernel_kinds": dict(program.kinds.most_common()),
    "traffic_bytes": program.bytes,
    "flops": program.flops,
    "step_seconds": program.seconds(gpu),
    "images_per_second": config.batch / program.seconds(gpu),
    "collectives": len(program.collectives),
    "conditionals": len(program.conditionals),
    "host_transfers": len(program.host_transfers),
    "compile_seconds": seconds,
  }
  if not row["fits"] and subject == "ours":
    row |= _ways_to_fit(gpu, config, inputs, devices, limit)
  return row


def _read(program):
  compiled, launches = program
  return memory.needed(compiled), hlo.read(compiled.as_text()), launches


def _train_step(config, gpu, inputs, devices):
  """Return the peak memory of a step, the steady-state program, launches."""
  needed, program, launches = _read(
    gpu_compile.train_step(config, gpu, inputs, devices)
  )
  Norm = norms.NORMS[config.model.norm]
  if issubclass(Norm, traits.Settling):  # Step 1 may need more.
    first = gpu_compile.train_step(config, gpu, inputs, devices, step=1)
    needed = max(needed, memory.needed(first.compiled))
  return needed, program, launches


def _ways_to_fit(gpu, config, inputs, devices, limit):
  """Return a batch size that fits, and memory and time with model.remat."""

  def step(key, value):
    _log.info("%s: does not fit, compiling %s=%s", gpu.title, key, value)
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({key: value})
    return _train_step(changed, gpu, inputs, devices)

  found = {}
  if not config.model.remat:
    needed, program, _ = step("model.remat", True)
    found["remat_memory_bytes"] = needed
    found["remat_step_seconds"] = program.seconds(gpu)
  found["largest_batch"] = largest_batch(
    lambda batch: step("batch", batch)[0],
    config.batch,
    config.accum_steps * devices,
    limit,
  )
  return found


def largest_batch(
  needed: Callable[[int], float], batch: int, divisor: int, limit: float
) -> int | None:
  """Return an estimate of the largest batch size that fits, or None.

  Fits memory = a + b batch to two compiled sizes. The result is compiled, too,
  and checked. Large results are multiples of 8.

  Args:
    needed: memory of a step in bytes, by batch size.
    batch: a size that does not fit.
    divisor: a divisor of all batch sizes.
    limit: available memory in bytes.
  """
  unit = divisor * (8 if batch > 64 * divisor else 1)
  small = max(1, batch // (4 * unit)) * unit
  large = 2 * small
  if large >= batch:
    return small if small < batch and needed(small) <= limit else None
  at_small, at_large = needed(small), needed(large)
  slope = (at_large - at_small) / (large - small)
  if slope <= 0:
    return None
  guess = small + int((limit - at_small) / slope / unit) * unit
  guess = min(guess, (batch - 1) // unit * unit)
  while guess > 0:
    if needed(guess) <= limit:
      return guess
    guess -= unit
  return None


def markdown(report: dict[str, Any]) -> str:
  """Return compiled.md from the content of compiled.json."""
  share, devices = report["memory_share"], report["devices"]
  count = len(report["rows"])
  planned = report.get("programs", count)
  lines = [
    "# Compiled for GPUs",
    "",
    f"- Command: `{report['command']}`",
    *([f"- Only {count} of {planned} programs"] * (count < planned)),
    report_lib.versions(report["versions"]),
    "- Compiled, not executed. Lower bound: each kernel takes the longer of its"
    " bytes at memory bandwidth and its products at peak speed. Launch"
    " overhead, caches and communication are not counted.",
    "- Launches: CUDA graphs, and kernels outside of them. The loop over"
    " micro-batches counts once.",
    f"- Fits: the step needs at most {100 * share:g} % of the GPU's memory, the"
    " share that JAX allocates (XLA_CLIENT_MEM_FRACTION). A dataset on the GPU"
    " needs additional memory: 0.2 GB for CIFAR.",
    *(
      [f"- {devices} GPUs; figures are per GPU, except images/s."]
      * (devices > 1)
    ),
    "",
    markdown_lib.table_of("llllrlrrrrrr", _COLUMNS, report["rows"]),
  ]
  return "\n".join(lines)


def _fits(row):
  if row["fits"]:
    return "yes"
  words = "no"
  if row.get("largest_batch"):
    words += f"; batch {row['largest_batch']} fits"
  if "remat_memory_bytes" in row:
    words += (
      f"; with model.remat {_format(row['remat_memory_bytes'] / 1e9)} GB and"
      f" {_format(1e3 * row['remat_step_seconds'])} ms"
    )
  return words


def _format(x: float) -> str:
  """Return a number with three significant digits."""
  return f"{x:.3g}" if x < 999.5 else f"{x:.0f}"


_COLUMNS = {
  "GPU": lambda row: row["gpu_title"],
  "model": lambda row: f"{row['model']} at {row['image_size']}",
  "batch, dtype, attention": lambda row: (
    f"{row['batch']}, {row['dtype']}, {row['attention']}"
  ),
  "program": report_lib.program,
  "memory, GB": lambda row: _format(row["memory_bytes"] / 1e9),
  "fits": _fits,
  "kernels (products)": lambda row: f"{row['kernels']} ({row['gemms']})",
  "launches": lambda row: str(row.get("launches") or ""),
  "traffic, GB": lambda row: _format(row["traffic_bytes"] / 1e9),
  "TFLOP": lambda row: _format(row["flops"] / 1e12),
  "lower bound, ms": lambda row: _format(1e3 * row["step_seconds"]),
  "images/s, at most": lambda row: _format(row["images_per_second"]),
}
