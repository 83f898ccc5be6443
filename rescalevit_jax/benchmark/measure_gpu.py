r"""Measure on a GPU within a time limit, most valuable measurements first.

  bash scripts/measure_gpu.sh --minutes=15 --data_dir=DIR --output=measurements

There are three stages. Each writes a file to --output as soon as a number is
known; summary.md contains all of them. The same command again continues with
unfinished measurements.

norms     One training step of every norm of ViT-B_16: losses in bfloat16 and
          float32 against float32 losses of a CPU, then time, compilation and
          memory of the recipe's step. Needs no dataset.
speed     images/s of training and evaluation, share of peak and memory, beside
          timm and flax if installed. --bounds=compiled.json adds the lower
          bounds of rescalevit_jax.benchmark --compile_for.
training  RescaleViT's recipe with its 200 evaluations: ViT-B_32 on CIFAR-10
          with Rescale, LN, BN and GN, the same on CIFAR-100, ViT-B_16 on both,
          then configs/cifar_strong.py. A run starts if the measured speed
          predicts that it ends in time. If no run does, the first one uses the
          remaining time; it saves a checkpoint, and the next call resumes it.

DIR holds CIFAR as prepared by rescalevit_jax.data.prepare; then neither
TensorFlow nor a network is needed. Exit code: 1 if a measurement failed or a
loss is off.
"""

from collections.abc import Sequence
import math
import os
import pathlib
import signal
import sys

from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_reference
from rescalevit_jax.benchmark import measure_session
from rescalevit_jax.benchmark.measure_results import STAGES
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal


def main(argv: Sequence[str] | None = None) -> int:
  """Run the measurements; return the exit code."""
  args = _parser().parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  # KeyboardInterrupt also ends the current subprocess.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return cli.run(lambda: _run(args))


def _parser():
  parser = cli.parser(
    __doc__,
    prog="measure_gpu.sh",
    allow_abbrev=False,
    epilog="scripts/measure_gpu.sh also accepts --wheels=DIR: wheels to install"
    " first, offline, for this program only.",
  )
  add = parser.add_argument
  add("--minutes", type=float, default=15.0, help="time limit (default: 15)")
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("measurements"),
    metavar="DIR",
    help="output folder (default: measurements/)",
  )
  add(
    "--runs_dir",
    type=pathlib.Path,
    metavar="DIR",
    help="folder of training runs (default: runs/ in --output)",
  )
  add("--data_dir", metavar="DIR", help="value of the config key tfds_data_dir")
  add(
    "--stages",
    default=",".join(STAGES),
    metavar="STAGE,...",
    help=f"stages to run (default: {','.join(STAGES)})",
  )
  add(
    "--bounds",
    type=pathlib.Path,
    metavar="FILE",
    help="compiled.json of rescalevit_jax.benchmark --compile_for",
  )
  add(
    "--rehearse",
    action="store_true",
    help="run all stages on the CPU with tiny models on the digits",
  )
  add(
    "--record_reference",
    action="store_true",
    help="only recompute the float32 losses, on the CPU",
  )
  return parser


def _run(args):
  stages = args.stages.split(",")
  for stage in stages:
    if stage not in STAGES:
      raise errors.UserError(
        f"--stages: unknown {stage!r}; {errors.nearest(stage, STAGES)}"
      )
  if not 0 < args.minutes < math.inf:
    raise errors.UserError(
      f"--minutes: {args.minutes:g} is not a finite number above 0; correct it"
    )
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # One GPU, as for peers.
  if args.rehearse or args.record_reference:
    os.environ["JAX_PLATFORMS"] = "cpu"  # For subprocesses.
  plan = (measure_plan.rehearsal if args.rehearse else measure_plan.real)(
    args.output, args.runs_dir or args.output / "runs", args.data_dir
  )
  if args.record_reference:
    measure_reference.record(plan)
    return 0
  args.output.mkdir(parents=True, exist_ok=True)
  if args.rehearse and not plan.reference.exists():
    measure_reference.record(plan)
  session = measure_session.Session(
    plan, args.output, 60 * args.minutes, args.bounds
  )
  stages = [stage for stage in STAGES if stage in stages]
  return session.run(stages, needs_gpu=not args.rehearse)


if __name__ == "__main__":
  sys.exit(main())
