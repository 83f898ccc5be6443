r"""Export a trained model for other programs.

  python -m rescalevit_jax.export --workdir=runs/a --output=a.npz
  python -m rescalevit_jax.export --workdir=runs/a --format=timm
  python -m rescalevit_jax.export --workdir=runs/a --output=a.stablehlo --fold
  python -m rescalevit_jax.export --npz=ViT-B_16.npz:tanh --output=a.onnx

Formats, by --format or by the suffix of --output:

  npz                 weights with the names of Google's ViT
  timm, huggingface, huggingface-dinov2
                      weights with the names of that library, for models with
                      LN (.safetensors means timm)
  stablehlo           the whole model for JAX on CPUs and NVIDIA GPUs
  onnx                the whole model for ONNX runtimes

Whole models map float32 images [batch, size, size, 3] in [-1, 1] to float32
logits [batch, classes], for any batch.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import sys
from typing import Any

import jax
from jax import export as jax_export
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import subjects
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.models import vit_config
from rescalevit_jax.models.norms import base
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal

_PLATFORMS = ("cpu", "cuda")  # Of StableHLO.
_MOST_BYTES = 2**31 - 2**20  # Of a protocol buffer or flatbuffer.


def main(argv: Sequence[str] | None = None) -> int:
  """Export a model; return the exit code."""
  parser = cli.parser(__doc__, prog="python -m rescalevit_jax.export")
  subjects.add_flags(parser)
  parser.add_argument(
    "--output", help="the file to write (default: WORKDIR/weights.SUFFIX)"
  )
  parser.add_argument(
    "--format",
    choices=tuple(_WRITERS),
    help="format of the file (default: by the suffix of --output, else npz)",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing output"
  )
  parser.add_argument(
    "--fold",
    action="store_true",
    help="fold the norm into the adjacent linear layers",
  )
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _run(args):
  output, file_format = _target(args)
  if args.output is not None:
    cli.check_output(output)
  if os.path.exists(output) and not args.overwrite:
    raise errors.UserError(
      f"{output}: exists already; choose another --output or add --overwrite"
    )
  model = subjects.load_one(args)
  source = f"the {args.checkpoint or 'best'} weights, of step {model.step}"
  if args.npz:
    source = f"the weights of {args.npz}"
  if args.fold:
    model = model.fold()
    source += ", norm folded"
  _WRITERS[file_format][1](model, output)
  print(f"{output}: {source}")
  options = _not_in_arrays(model.model.config)
  if file_format == "npz" and options:
    print(
      "the arrays do not contain all options of the model; set them with"
      " model.* keys, or for predict, export and plot_attention with"
      f" --npz={output}:{','.join(options)}"
    )
  if (size := model.resize.image_size) is not None:
    print(
      f"the run first resizes images to {size} pixels (data.resize="
      f"{model.resize.method}), which the file does not contain; do the same"
      " before you use it"
    )


def _target(args):
  """Return the path of the output and its format."""
  if args.output is None:
    if args.npz:
      raise errors.UserError("--npz: has no default output; add --output")
    file_format = args.format or "npz"
    return f"{args.workdir}/weights{_WRITERS[file_format][0]}", file_format
  if args.format is not None:
    return args.output, args.format
  for file_format, (suffix, _) in _WRITERS.items():
    if suffix == pathlib.Path(args.output).suffix:
      return args.output, file_format
  raise errors.UserError(
    f"--output: {args.output} has no known suffix; add --format"
  )


def _save_npz(model, output):
  npz.save(output, *_weights(model))


def _weights(model):
  """Return parameters and statistics; without a head if the file had none."""
  params = dict(model.variables["params"])
  if not model.class_names:
    del params["head"]
  return params, model.variables.get("batch_stats", {})


def _save_family(model, output, family):
  """Write weights with the names of another library."""
  if options := _not_in_arrays(model.model.config):
    raise errors.UserError(
      f"--format={family}: cannot store {', '.join(options)}; choose npz"
    )
  try:
    from safetensors import numpy as safetensors
  except ImportError as e:
    raise errors.UserError(
      f"--format={family}: needs safetensors; pip install"
      " 'rescalevit-jax[convert]'"
    ) from e
  arrays = {
    key: np.asarray(x)
    for key, x in param_keys.flatten(*_weights(model)).items()
  }
  families.check_complete(arrays, family, f"--format={family}")
  tensors = families.write(arrays, family)
  # transformers requires a format.
  heads = str(model.model.config.num_heads)
  metadata = {"format": "pt", families.NUM_HEADS: heads}
  atomic_file.write(output, safetensors.save(tensors, metadata))


def _save_stablehlo(model, output):
  function, size = _program(model, "stablehlo")
  (batch,) = jax_export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
  exported = jax_export.export(jax.jit(function), platforms=_PLATFORMS)(images)
  atomic_file.write(output, bytes(exported.serialize()))


def _save_onnx(model, output):
  function, size = _program(model, "onnx")
  # jax2onnx warns of plugins that a ViT does not use.
  for name in ("jax2onnx", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.ERROR)
  try:
    import jax2onnx
  except ImportError as e:
    raise errors.UserError(
      "--format=onnx: needs jax2onnx; pip install 'rescalevit-jax[onnx-export]'"
    ) from e
  converted = jax2onnx.to_onnx(
    function,
    [("batch", size, size, 3)],
    input_names=["images"],
    output_names=["logits"],
  )
  atomic_file.write(output, converted.SerializeToString())


def _program(
  model: trained_model.TrainedModel, file_format: str
) -> tuple[Callable[[Any], Any], int]:
  """Return the function from images to logits, and the size of its images.

  It computes in float32 and without cuDNN, on any device.
  """
  if not model.class_names:
    raise errors.UserError(
      f"{model.name}: has no head; fine-tune it, or choose npz"
    )
  size = sum(x.nbytes for x in jax.tree.leaves(model.variables))
  if size > _MOST_BYTES:
    raise errors.UserError(
      f"--format={file_format}: the weights take {size / 1e9:.1f} GB, more than"
      " the 2 GB of a file; choose npz"
    )
  config = dataclasses.replace(
    model.model.config, dtype="float32", attention="xla"
  )
  module = model.model.clone(config=config)
  return (
    lambda images: module.apply(model.variables, images, train=False),
    model.image_size,
  )


def _not_in_arrays(config: vit_config.ViTConfig) -> list[str]:
  """Return the options that the arrays do not show, in `--npz`'s syntax."""
  inferred = detect.same_arrays(config.norm)[0]
  options = [config.norm] if config.norm != inferred else []
  options += [config.gelu] if config.gelu != "erf" else []
  options += [config.pool] if config.pool != "cls" else []
  if config.residual_c is not None:
    options.append(f"c={config.residual_c!r}")
  if config.residual == "convex":
    options.append("convex")
  if config.norm_depth_scaling:
    options.append("depth_scaling")
  if config.logit_cap is not None:
    options.append(f"logit_cap={config.logit_cap!r}")
  if config.norm_epsilon != base.Options.epsilon:
    options.append(f"eps={config.norm_epsilon!r}")
  if config.norm == "GN" and config.gn_groups != base.Options.groups:
    options.append(f"groups={config.gn_groups}")
  return options


# Suffix and writer of each format; a suffix selects its first format.
_WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
  "npz": (".npz", _save_npz),
  **{
    family: (".safetensors", functools.partial(_save_family, family=family))
    for family in families.TABLES
  },
  "stablehlo": (".stablehlo", _save_stablehlo),
  "onnx": (".onnx", _save_onnx),
}


if __name__ == "__main__":
  sys.exit(main())
