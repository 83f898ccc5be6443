"""Export a run's weights as an `.npz` with the keys of Google's checkpoints.

python -m rescalevit_jax.analysis.export_npz --workdir=runs/a --output=a.npz
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import fold as fold_lib
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint as checkpoint_lib
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Export a checkpoint; return the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--output", required=True, help="the .npz to write")
  parser.add_argument(
    "--checkpoint",
    choices=("best", "latest"),
    default="best",
    help="checkpoint to export (default: best)",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing output"
  )
  parser.add_argument(
    "--fold",
    action="store_true",
    help="fold the norm, if it folds, into the linear layers after it",
  )
  args = parser.parse_args(cli.arguments(argv))
  return cli.run(
    lambda: export(
      args.workdir,
      args.output,
      checkpoint=args.checkpoint,
      fold=args.fold,
      overwrite=args.overwrite,
    )
  )


def export(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  checkpoint: str = "best",
  fold: bool = False,
  overwrite: bool = False,
) -> None:
  """Export a checkpoint of a run.

  Args:
    workdir: folder of the run.
    output: the `.npz` to write.
    checkpoint: 'best' or 'latest'.
    fold: True to fold the norm into the linear layers after it.
    overwrite: True to replace an existing file.

  Raises:
    UserError: there is no checkpoint, the norm does not fold, or the output
      exists.
  """
  if os.path.exists(output) and not overwrite:
    raise errors.UserError(
      f"{output}: exists already; choose another --output or add --overwrite"
    )
  workdir = pathlib.Path(workdir)
  params, batch_stats, step = checkpoint_lib.load_variables(workdir, checkpoint)
  model = folder.require_config(workdir).model
  if fold:
    params, batch_stats = fold_lib.fold(model.norm, params, batch_stats)
  npz.save(os.fspath(output), params, batch_stats)
  folded = ", norm folded" if fold else ""
  print(f"{output}: the {checkpoint} weights, of step {step}{folded}")
  if options := _not_in_arrays(model):
    print(
      "the arrays do not contain all options of the model; set them with"
      " model.* keys, or for plot_attention with"
      f" --npz={output}:{','.join(options)}"
    )


def _not_in_arrays(model):
  """Return the options that the arrays do not show, as `--npz` takes them."""
  inferred = detect.same_arrays(model.norm)[0]
  options = [model.norm] if model.norm != inferred else []
  options += [model.gelu] if model.gelu != "erf" else []
  options += [model.pool] if model.pool != "cls" else []
  if model.residual == "rescalenet" and model.residual_c is not None:
    options.append(f"c={model.residual_c!r}")
  return options


if __name__ == "__main__":
  sys.exit(main())
