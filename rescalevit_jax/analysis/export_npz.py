"""Export a run's weights for Google's ViT, timm or Hugging Face.

python -m rescalevit_jax.analysis.export_npz --workdir=runs/a --output=a.npz
python -m rescalevit_jax.analysis.export_npz --workdir=runs/a --family=timm
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import fold as fold_lib
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.runs import checkpoint as checkpoint_lib
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
  """Export a checkpoint; return the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument(
    "--output", help="the file to write (default: WORKDIR/weights.SUFFIX)"
  )
  parser.add_argument(
    "--family",
    choices=("google", *families.TABLES),
    default="google",
    help="names of the weights: google writes .npz, the others .safetensors,"
    " for models with LN (default: google)",
  )
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
  suffix = ".npz" if args.family == "google" else ".safetensors"
  output = args.output or pathlib.Path(args.workdir, f"weights{suffix}")
  return cli.run(
    lambda: export(
      args.workdir,
      output,
      family=args.family,
      checkpoint=args.checkpoint,
      fold=args.fold,
      overwrite=args.overwrite,
    )
  )


def export(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  family: str = "google",
  checkpoint: str = "best",
  fold: bool = False,
  overwrite: bool = False,
) -> None:
  """Export a checkpoint of a run.

  Args:
    workdir: folder of the run.
    output: the file to write.
    family: 'google' for an `.npz`; a key of `families.TABLES` for a safetensors
      file with that library's names.
    checkpoint: 'best' or 'latest'.
    fold: True to fold the norm into the linear layers after it.
    overwrite: True to replace an existing file.

  Raises:
    UserError: there is no checkpoint, the norm does not fold, the output
      exists, or the family has no such model.
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
  if family == "google":
    npz.save(os.fspath(output), params, batch_stats)
  else:
    _save_family(output, family, params, batch_stats, model)
  folded = ", norm folded" if fold else ""
  print(f"{output}: the {checkpoint} weights, of step {step}{folded}")
  if options := _not_in_arrays(model):
    print(
      "the arrays do not contain all options of the model; set them with"
      " model.* keys, or for plot_attention with"
      f" --npz={output}:{','.join(options)}"
    )


def _save_family(output, family, params, batch_stats, model):
  if options := _not_in_arrays(model):
    raise errors.UserError(
      f"--family={family}: has no model with {', '.join(options)}; choose"
      " google"
    )
  try:
    from safetensors import numpy as safetensors
  except ImportError as e:
    raise errors.UserError(
      f"--family={family}: needs safetensors; pip install"
      " 'rescalevit-jax[convert]'"
    ) from e
  arrays = {
    key: np.asarray(x)
    for key, x in param_keys.flatten(params, batch_stats).items()
  }
  table = families.TABLES[family]
  families.check_complete(arrays, table, f"--family={family}")
  query = "encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
  heads = arrays[f"Transformer/{query}"].shape[1]
  tensors = families.write(arrays, table, heads)
  if family == "timm":
    tensors = families.join_qkv(tensors)
  atomic_file.write(output, safetensors.save(tensors))


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
