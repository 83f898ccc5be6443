r"""Measures how fast training and evaluation are, and what a start takes.

  python -m rescalevit_jax.benchmark --config=configs/cifar_small.py \
      --grid model.norm=LN,BN,GN,Rescale --peer
  python -m rescalevit_jax.benchmark --config=configs/vit_b16_ln.py \
      --grid model_name=ViT-B_16,ViT-B_32,ViT-L_16,ViT-L_32 --peer

Flags and grid are those of rescalevit_jax.sweep. --peer adds timm's
VisionTransformer under torch.compile and a plain flax.linen ViT (pip install -e
'.[timm]' for the former). Everything is measured in a process of its own, in
turn, in several rounds, so that a busy machine slows all alike. With
--set diagnostics_every=N it says what diagnostics cost, too. Writes
benchmark.md and benchmark.json, with the hardware and the versions.

  python -m rescalevit_jax.benchmark --config=configs/vit_b16_ln.py \
      --compile_for=a100-40,h100

measures nothing: it compiles the training step for GPUs that need not be here,
and says what it takes of them; see forecast.py. Writes compiled.md and
compiled.json.
"""

import argparse
from collections.abc import Mapping, Sequence
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.benchmark import forecast
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.config import overrides
from rescalevit_jax.models import flops
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import huge_pages
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import die_with_parent
from rescalevit_jax.sweep import grid

_log = logging.getLogger("rescalevit_jax.benchmark")

PEERS = {"flax": "flax", "timm": "timm"}  # Subjects, and what they import.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm")
_FIRST_STEP = "first step done"


def main(argv: Sequence[str] | None = None) -> int:
  """Measures; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", action="append", required=True, metavar="FILE[:ARGS]")
  add("--grid", action="append", default=[], metavar="KEY=VALUE,...")
  add(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="a config key, the same in all; may be given again",
  )
  add("--peer", action="store_true", help="measure others' programs, too")
  add("--rounds", type=int, default=3, help="default: 3")
  add(
    "--seconds",
    type=float,
    default=10.0,
    help="of training measured in each round and process; default: 10",
  )
  add(
    "--eval_images",
    type=int,
    default=10_000,
    help="test images of an evaluation, at most; default: 10000",
  )
  add(
    "--no_start",
    action="store_true",
    help="leave out the times from a program's start to its first step",
  )
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("benchmark"),
    metavar="DIR",
    help="folder of benchmark.md and benchmark.json; default: benchmark/",
  )
  add(
    "--compile_for",
    metavar="GPU,...",
    help=f"do not measure, but compile for {', '.join(gpus.NAMES)}",
  )
  add(
    "--devices",
    type=int,
    default=1,
    help="GPUs to compile for, of one host; default: 1",
  )
  args = parser.parse_args(argv)
  terminal.log_to_stderr()
  # So that the process that measures just now ends with this one.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return cli.run(lambda: _run(args))


def _run(args):
  if args.devices < 1:
    raise errors.UserError("--devices: must be > 0")
  if args.rounds < 1 or not args.seconds > 0 or args.eval_images < 1:
    raise errors.UserError("--rounds, --seconds, --eval_images: must be > 0")
  runs = grid.plan(
    args.config,
    [overrides.parse_axis(text) for text in args.grid],
    [overrides.parse_setting(text, "--set") for text in args.set],
    pathlib.Path("runs"),
  )
  if args.compile_for:
    forecast.forecast(
      runs,
      [gpus.get(name) for name in args.compile_for.split(",")],
      devices=args.devices,
      with_peer=args.peer,
      command=_command(args),
      output=args.output,
    )
    return
  subjects = ["ours"]
  if args.peer:
    for name, package in PEERS.items():
      if importlib.util.find_spec(package) is None:
        _log.warning("%s is not installed: left out", package)
      else:
        subjects.append(name)
  entries = [
    {"run": run, "subject": subject, "rounds": []}
    for run in runs
    # A peer has LayerNorm, whatever our norm: once for each model is enough.
    for subject in (subjects if report_lib.is_first(run, runs) else ["ours"])
  ]
  args.output.mkdir(parents=True, exist_ok=True)  # It fails now or never.
  load_before = os.getloadavg()
  options = {"seconds": args.seconds, "eval_images": args.eval_images}
  total, start = args.rounds * len(entries), time.monotonic()
  for i in range(total):
    entry = entries[i % len(entries)]
    entry["rounds"].append(measure(entry["run"], entry["subject"], options))
    left = (time.monotonic() - start) / (i + 1) * (total - i - 1)
    _log.info(
      "%d/%d  %s %s: %.0f images/s  ETA %s",
      i + 1,
      total,
      entry["run"].workdir.name,
      entry["subject"],
      entry["rounds"][-1]["images_per_second"],
      terminal.duration(left),
    )
  starts = []
  if not args.no_start:
    starts = [
      _measure_starts(run) for run in runs if report_lib.is_first(run, runs)
    ]
  report = {
    "command": _command(args),
    "machine": {**machine(), "load_before": load_before},
    "entries": [describe(entry, entries) for entry in entries],
    "starts": starts,
  }
  text = report_lib.markdown(report)
  atomic_file.write(
    args.output / "benchmark.json", json.dumps(report, indent=2) + "\n"
  )
  atomic_file.write(args.output / "benchmark.md", text)
  print(text)


def _command(args):
  """Returns what was asked for, but for where files lie."""
  words = ["python -m rescalevit_jax.benchmark"]
  words += [f"--config={text}" for text in args.config]
  words += [f"--grid={text}" for text in args.grid]
  words += [
    f"--set={text}"
    for text in args.set
    if not text.startswith("tfds_data_dir=")
  ]
  words += ["--peer"] * args.peer
  if args.compile_for:
    words += [f"--compile_for={args.compile_for}", f"--devices={args.devices}"]
    return " ".join(words)
  words += ["--no_start"] * args.no_start
  for name in ("rounds", "seconds", "eval_images"):
    words.append(f"--{name}={getattr(args, name):g}")
  return " ".join(words)


def measure(
  run: grid.PlannedRun,
  subject: str,
  options: Mapping[str, float],
  timeout: float | None = None,
) -> dict[str, Any]:
  """Return what a process of its own measures in one round.

  Args:
    run: what to measure, or what to compare a peer with.
    subject: 'ours' or a key of `PEERS`.
    options: `seconds` and `eval_images`, as the flags.
    timeout: seconds, after which the process is ended.

  Raises:
    UserError: it failed.
    subprocess.TimeoutExpired: it took longer than `timeout`.
  """
  command = [
    sys.executable,
    "-m",
    "rescalevit_jax.benchmark.worker",
    subject,
    config_lib.to_json(run.config),
    json.dumps(options),
  ]
  environment = _environment()
  if (
    subject == "ours"
  ):  # As `rescalevit_jax.main` does; peers run as they come.
    environment = huge_pages.environment(environment)
  done = subprocess.run(
    die_with_parent.wrap(command),
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=timeout,
  )
  try:
    return json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError) as e:
    reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise errors.UserError(f"{run.workdir.name}, {subject}: {reason}") from e


def _environment():
  """Returns the variables of what is measured: one GPU, as peers have it."""
  environment = dict(os.environ)
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  gpus = environment.get("CUDA_VISIBLE_DEVICES") or "0"
  environment["CUDA_VISIBLE_DEVICES"] = gpus.partition(",")[0]
  return environment


def _measure_starts(run):
  """Returns the seconds to the first step, without caches and with them."""
  with tempfile.TemporaryDirectory() as folder:
    seconds = []
    for i in range(3):
      seconds.append(_seconds_to_first_step(run, pathlib.Path(folder), i))
      _log.info("start %d of %s: %.1f s", i, run.workdir.name, seconds[-1])
  return {"run": run.workdir.name, "cold": seconds[0], "warm": seconds[1:]}


def _seconds_to_first_step(run, folder, i):
  command = [*run.command, f"--workdir={folder / str(i)}"]
  environment = {**_environment(), "XDG_CACHE_HOME": str(folder / "cache")}
  start = time.monotonic()
  process = subprocess.Popen(
    command,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )
  try:
    lines = []
    for line in process.stderr:
      if _FIRST_STEP in line:
        return time.monotonic() - start
      lines.append(line.strip())
  finally:
    process.kill()
    process.communicate()
  reason = lines[-1] if lines else "it printed nothing"
  raise errors.UserError(f"{run.workdir.name}: {reason}")


def describe(
  entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Return medians over the rounds, and ratios to the peers of each round.

  Args:
    entry: `run`, `subject` and `rounds`, a list of what `measure` returns.
    entries: all of the report, among them those to compare with.
  """
  rounds = entry["rounds"]
  config = entry["run"].config
  medians = {
    key: statistics.median(r[key] for r in rounds)
    for key, value in rounds[0].items()
    if isinstance(value, int | float)
  }
  speeds = [r["images_per_second"] for r in rounds]
  found = {
    "run": entry["run"].workdir.name,
    "norm": config.model.norm if entry["subject"] == "ours" else "LN",
    "model": config.model_name,
    "image_size": config.image_size,
    "batch": config.batch,
    "dtype": rounds[0]["dtype"],
    "subject": entry["subject"],
    "settings": report_lib.settings(
      config, [other["run"].config for other in entries]
    ),
    **medians,
    "images_per_second_range": [min(speeds), max(speeds)],
    "rounds": rounds,
  }
  if entry["subject"] != "ours":
    return found
  model = models.create(
    config.model_name,
    num_classes=10,
    image_size=config.image_size,
    **{**config.model, "attention": "xla"},
  )
  training = 3 * flops.forward_flops(model, config.image_size)
  found["training_flops_per_image"] = training
  found["peak_share"] = statistics.median(
    training * r["images_per_second"] / r["peak_flops_per_second"]
    for r in rounds
  )
  mine = config_lib.flatten(config)
  for other in entries:
    theirs = config_lib.flatten(other["run"].config)
    same = all(mine[k] == theirs[k] for k in mine if k != "model.norm")
    if same and other["subject"] != "ours":
      found[f"ratio_to_{other['subject']}"] = _ratio(rounds, other["rounds"])
    if same and other["subject"] == "ours" and theirs["model.norm"] == "LN":
      found["ratio_to_LN"] = _ratio(rounds, other["rounds"])
  return found


def _ratio(ours, theirs):
  return statistics.median(
    a["images_per_second"] / b["images_per_second"]
    for a, b in zip(ours, theirs, strict=True)
  )


def machine() -> dict[str, Any]:
  """Return the hardware and the versions that are measured with."""
  # In a process of its own, for it takes hold of every GPU.
  look = (
    "import jax; print(jax.device_count(), 'x', jax.devices()[0].device_kind)"
  )
  done = subprocess.run(
    [sys.executable, "-c", look],
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(f"JAX finds no devices: {reason}")
  kind = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text(errors="replace").splitlines()
    names = [x.partition(": ")[2] for x in lines if x.startswith("model name")]
    kind = (names or [kind])[0]
  versions = {"python": platform.python_version()}
  for package in _PACKAGES:
    if importlib.util.find_spec(package) is not None:
      versions[package] = importlib.metadata.version(package)
  return {
    "devices": done.stdout.strip().splitlines()[-1],
    "processor": kind,
    "cores": len(os.sched_getaffinity(0)),
    "versions": versions,
  }
