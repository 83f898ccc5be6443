"""Writes a run's weights as an `.npz` with the keys of Google's checkpoints.

python -m rescalevit_jax.analysis.export_npz --workdir=runs/a --output=a.npz
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.pretrained import fold
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Exports a checkpoint; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="the run's folder")
  parser.add_argument("--output", required=True, help="the .npz to write")
  parser.add_argument(
    "--checkpoint",
    choices=("best", "latest"),
    default="best",
    help="whose weights; default: best",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing output"
  )
  parser.add_argument(
    "--fold",
    action="store_true",
    help="put the norm (Cal, Rescale, Fade) into the layers after it",
  )
  args = parser.parse_args(argv)
  return cli.run(lambda: _run(args))


def _run(args):
  if os.path.exists(args.output) and not args.overwrite:
    raise errors.UserError(
      f"{args.output}: exists already; choose another --output or add"
      " --overwrite"
    )
  params, batch_stats, step = checkpoint.load_variables(
    pathlib.Path(args.workdir), args.checkpoint
  )
  model = folder.require_config(args.workdir).model
  if args.fold:
    params, batch_stats = fold.fold(model.norm, params, batch_stats)
  npz.save(args.output, params, batch_stats)
  folded = ", without its norm" if args.fold else ""
  print(f"{args.output}: the {args.checkpoint} weights, of step {step}{folded}")
  if words := _untold(model):
    print(
      "what its arrays do not tell has to be said by model.* keys, or to"
      f" plot_attention.py as --npz={args.output}:{','.join(words)}"
    )


def _untold(model):
  """Returns what the model has that no array shows, as `--npz` takes it."""
  words = ["GN"] if model.norm == "GN" else []  # It does not fold.
  words += [model.gelu] if model.gelu != "erf" else []
  words += [model.pool] if model.pool != "cls" else []
  if model.residual == "rescalenet" and model.residual_c is not None:
    words.append(f"c={model.residual_c!r}")
  return words


if __name__ == "__main__":
  sys.exit(main())
