r"""Measure the speed of training and evaluation, and the start-up time.

  python -m rescalevit_jax.benchmark --config=configs/cifar_small.py \
      --grid model.norm=LN,BN,GN,Rescale --peer
  python -m rescalevit_jax.benchmark --config=configs/vit_b16_ln.py \
      --grid model_name=ViT-B_16,ViT-B_32,ViT-L_16,ViT-L_32 --peer

Flags and grid are as in rescalevit_jax.sweep. --peer adds timm's
VisionTransformer under torch.compile (pip install -e '.[timm]') and a plain
flax.linen ViT. Each program is measured in its own process. Programs take
turns over several rounds, which spreads the load of a busy machine evenly. With
--set diagnostics_every=N the cost of diagnostics is measured, too. Writes
benchmark.md and benchmark.json, with hardware and versions.

  python -m rescalevit_jax.benchmark --config=configs/vit_b16_ln.py \
      --compile_for=a100-40,h100

measures nothing. It compiles the training step for GPUs that need not be
present and reports memory, FLOPs and a lower bound of the step time; see
forecast.py. Writes compiled.md and compiled.json.
"""

from collections.abc import Sequence
import logging
import math
import os
import pathlib
import signal
import time

from rescalevit_jax import errors
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import forecast
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import machine
from rescalevit_jax.benchmark import peers
from rescalevit_jax.benchmark import report as report_lib
from rescalevit_jax.benchmark import run_worker
from rescalevit_jax.config import overrides
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import grid

_log = logging.getLogger("rescalevit_jax.benchmark")


def main(argv: Sequence[str] | None = None) -> int:
  """Run the benchmark; return the exit code."""
  parser = cli.parser(__doc__)
  add = parser.add_argument
  add("--config", action="append", required=True, metavar="FILE[:ARGS]")
  add("--grid", action="append", default=[], metavar="KEY=VALUE,...")
  add(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="override for all configs; repeatable",
  )
  add("--peer", action="store_true", help="measure timm and flax, too")
  add(
    "--same_malloc",
    action="store_true",
    help="give peers the malloc settings of rescalevit_jax.main",
  )
  add("--rounds", type=int, default=3, help="rounds (default: 3)")
  add(
    "--seconds",
    type=float,
    default=10.0,
    help="seconds of training per round and process (default: 10)",
  )
  add(
    "--eval_images",
    type=int,
    default=10_000,
    help="maximum number of test images per evaluation (default: 10000)",
  )
  add("--no_start", action="store_true", help="omit the start-up times")
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("benchmark"),
    metavar="DIR",
    help="output folder (default: benchmark/)",
  )
  add(
    "--compile_for",
    type=lambda text: text.split(","),
    metavar="GPU,...",
    help=f"compile for GPUs instead: {', '.join(gpus.NAMES)}",
  )
  add(
    "--devices",
    type=int,
    default=1,
    help="number of GPUs to compile for, on one host (default: 1)",
  )
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  # KeyboardInterrupt also ends the current subprocess.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return cli.run(lambda: _run(args))


def _run(args):
  if args.devices < 1:
    raise errors.UserError(
      f"--devices: {args.devices} is less than 1; raise it"
    )
  if args.devices > 1 and not args.compile_for:
    raise errors.UserError(
      "--devices: applies to compiled programs only; add --compile_for"
    )
  finite = 0 < args.seconds < math.inf
  if args.rounds < 1 or not finite or args.eval_images < 1:
    raise errors.UserError(
      "--rounds, --seconds, --eval_images: give finite numbers above 0"
    )
  if args.same_malloc and (args.compile_for or not args.peer):
    raise errors.UserError(
      "--same_malloc: applies to measured peers only; add --peer"
    )
  runs = grid.plan(
    args.config,
    [overrides.parse_axis(text) for text in args.grid],
    [overrides.parse_setting(text, "--set") for text in args.set],
    pathlib.Path("runs"),
  )
  if args.peer:
    for run in runs:
      peers.check_recipe(run.config)
  targets = [gpus.get(x) for x in args.compile_for or ()]
  args.output.mkdir(parents=True, exist_ok=True)  # Report errors early.
  report = {"command": _command(args)}
  if targets:
    for found in forecast.forecast(
      runs, targets, devices=args.devices, with_peer=args.peer
    ):
      report |= found
      text = forecast.markdown(report)
      _write(args.output / "compiled", report, text)
  else:
    report |= _measure(runs, args)
    text = report_lib.markdown(report)
    _write(args.output / "benchmark", report, text)
  print(text)


def _write(path, report, text):
  atomic_file.write_json(path.with_suffix(".json"), report)
  atomic_file.write(path.with_suffix(".md"), text)


def _measure(runs, args):
  """Return the content of benchmark.json."""
  load_before = os.getloadavg()
  first_runs = [run for run in runs if comparison.is_first(run, runs)]
  return {
    "machine": {**machine.describe(), "load_before": load_before},
    "same_malloc": args.same_malloc,
    "entries": _measure_programs(runs, first_runs, args),
    "starts": [
      run_worker.measure_starts(run) for run in first_runs if not args.no_start
    ],
  }


def _measure_programs(runs, first_runs, args):
  """Measure all programs in turn, over several rounds."""
  subjects = ["ours"]
  if args.peer:
    for name in peers.PEERS:
      if peers.is_installed(name):
        subjects.append(name)
      else:
        _log.warning("%s is not installed; skipped", name)
  entries = [
    {"run": run, "subject": subject, "rounds": []}
    for run in runs
    # A peer always has LayerNorm: measure it once per model.
    for subject in (subjects if run in first_runs else ["ours"])
  ]
  options = {"seconds": args.seconds, "eval_images": args.eval_images}
  total, start = args.rounds * len(entries), time.monotonic()
  for i, entry in enumerate(entries * args.rounds, 1):
    found = run_worker.measure(
      entry["run"],
      entry["subject"],
      options,
      same_malloc=args.same_malloc,
    )
    entry["rounds"].append(found)
    _log.info(
      "%d/%d  %s %s: %.0f images/s  ETA %s",
      i,
      total,
      entry["run"].workdir.name,
      entry["subject"],
      found["images_per_second"],
      terminal.duration((time.monotonic() - start) / i * (total - i)),
    )
  return [comparison.describe(entry, entries) for entry in entries]


def _command(args):
  """Return the command line without paths."""
  words = ["python -m rescalevit_jax.benchmark"]
  words += [
    f"--{flag}={text}"
    for flag in ("config", "grid", "set")
    for text in getattr(args, flag)
    if not text.startswith("tfds_data_dir=")
  ]
  words += ["--peer"] * args.peer
  if args.compile_for:
    gpu_names = ",".join(args.compile_for)
    words += [f"--compile_for={gpu_names}", f"--devices={args.devices}"]
    return " ".join(words)
  words += ["--same_malloc"] * args.same_malloc
  words += ["--no_start"] * args.no_start
  for name in ("rounds", "seconds", "eval_images"):
    words.append(f"--{name}={getattr(args, name):g}")
  return " ".join(words)
