"""Convert a DINOv2 backbone in an ONNX file to an `.npz` with Google's names.

python -m rescalevit_jax.pretrained.convert_dinov2 FILE.onnx --output=dinov2.npz

The file is an ONNX export of Hugging Face's Dinov2Model. LayerScale is folded
into the projections before it, the normalization of the input into the patch
embedding. The result is a ViT with LN and a head of zeros. Needs the extra
`onnx`.
"""

import argparse
from collections.abc import Sequence
import re
import sys

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.runtime import cli

# Of the images that DINOv2 was trained on, scaled to [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406])
_STD = np.array([0.229, 0.224, 0.225])
_HEAD_SIZE = 64  # In every DINOv2 model.


def main(argv: Sequence[str] | None = None) -> int:
  """Convert a file; return the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", help="the ONNX file")
  parser.add_argument("--output", required=True, help="the .npz to write")
  args = parser.parse_args(argv)
  return cli.run(lambda: _run(args))


def _run(args):
  try:
    arrays = convert(_read(args.file))
  except KeyError as e:
    raise errors.UserError(
      f"{args.file}: has no array {e}; use an export of Dinov2Model"
    ) from e
  np.savez(args.output, **{k: np.float32(x) for k, x in arrays.items()})


def _read(file):
  """Return {name: array}; a MatMul's kernel has the name of its node.

  Positions are split in two constants: `cls_position` and `positions`.
  """
  try:
    import onnx  # Optional.
    from onnx import numpy_helper
  except ImportError as e:
    raise errors.UserError(
      "onnx is not installed; install the extra 'onnx'"
    ) from e
  try:
    graph = onnx.load(file, load_external_data=False).graph
  except Exception as e:  # protobuf's error is not public.
    if isinstance(e, OSError):
      raise
    raise errors.UserError(f"{file}: is not an ONNX file ({e})") from e
  stored = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
  arrays = {name.removeprefix("backbone."): x for name, x in stored.items()}
  for node in graph.node:
    for name in node.input:
      if name not in stored:
        continue
      kernel = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
      if node.op_type == "MatMul" and kernel:
        arrays[f"{kernel[1].replace('/', '.')}.weight"] = stored[name]
      elif node.name.startswith("/backbone/embeddings/Concat"):
        arrays["cls_position"] = stored[name]
      elif node.name.startswith("/backbone/embeddings/Reshape"):
        if stored[name].ndim == 3:
          arrays["positions"] = stored[name]
  return arrays


def convert(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the arrays of an equal ViT under Google's names.

  Args:
    arrays: DINOv2's by Hugging Face's names, kernels of layers [in, out].
  """
  patch = "embeddings.patch_embeddings.projection"
  kernel = arrays[f"{patch}.weight"].transpose(2, 3, 1, 0)
  shift = ((0.5 - _MEAN) / _STD)[:, None]
  width = kernel.shape[-1]
  positions = [arrays["cls_position"], arrays["positions"]]
  found = {
    # Our images are in [-1, 1].
    "embedding/kernel": kernel / (2 * _STD)[:, None],
    "embedding/bias": arrays[f"{patch}.bias"] + (kernel * shift).sum((0, 1, 2)),
    "cls": arrays["embeddings.cls_token"],
    "Transformer/posembed_input/pos_embedding": np.concatenate(positions, 1),
    "Transformer/encoder_norm/scale": arrays["layernorm.weight"],
    "Transformer/encoder_norm/bias": arrays["layernorm.bias"],
    "head/kernel": np.zeros((width, 1000)),
    "head/bias": np.zeros(1000),
  }
  names = "\n".join(arrays)
  layers = set(re.findall(r"^encoder\.layer\.(\d+)\.", names, re.MULTILINE))
  for i in sorted(map(int, layers)):
    theirs = f"encoder.layer.{i}."
    ours = f"Transformer/encoderblock_{i}/"
    attention = f"{ours}MultiHeadDotProductAttention_1/"
    heads = (width // _HEAD_SIZE, _HEAD_SIZE)
    for name in ("query", "key", "value"):
      layer = f"{theirs}attention.attention.{name}"
      weight, bias = arrays[f"{layer}.weight"], arrays[f"{layer}.bias"]
      found[f"{attention}{name}/kernel"] = weight.reshape(width, *heads)
      found[f"{attention}{name}/bias"] = bias.reshape(heads)
    for name, layer, scale in (
      (f"{attention}out", "attention.output.dense", "layer_scale1"),
      (f"{ours}MlpBlock_3/Dense_0", "mlp.fc1", None),
      (f"{ours}MlpBlock_3/Dense_1", "mlp.fc2", "layer_scale2"),
    ):
      gain = arrays[f"{theirs}{scale}.lambda1"] if scale else 1.0
      found[f"{name}/kernel"] = arrays[f"{theirs}{layer}.weight"] * gain
      found[f"{name}/bias"] = arrays[f"{theirs}{layer}.bias"] * gain
    out = found[f"{attention}out/kernel"]
    found[f"{attention}out/kernel"] = out.reshape(*heads, width)
    for slot, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
      found[f"{ours}{slot}/scale"] = arrays[f"{theirs}{norm}.weight"]
      found[f"{ours}{slot}/bias"] = arrays[f"{theirs}{norm}.bias"]
  return found


if __name__ == "__main__":
  sys.exit(main())
