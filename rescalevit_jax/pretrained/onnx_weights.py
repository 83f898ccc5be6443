"""The weights of a Hugging Face model that was exported to ONNX.

The exporter keeps the names of vectors, but numbers the matrices of linear
layers. The names of the nodes that multiply by a matrix contain its name.
"""

import pathlib
import re

import numpy as np

from rescalevit_jax import errors

_POSITIONS = "embeddings.position_embeddings"


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read the tensors of a Dinov2Model by Hugging Face's names."""
  import onnx  # Optional.
  from onnx import numpy_helper

  graph = onnx.load(path, load_external_data=False).graph
  stored = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
  parts = ("backbone.embeddings", "backbone.encoder", "backbone.layernorm")
  tensors = {
    name.removeprefix("backbone."): x
    for name, x in stored.items()
    if name.startswith(parts)
  }
  positions = {}
  for node in graph.node:
    layer = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
    for name in node.input:
      x = stored.get(name)
      if x is None:
        continue
      if node.op_type == "MatMul" and layer:
        tensors[f"{layer[1].replace('/', '.')}.weight"] = x.T
      elif node.name.startswith("/backbone/embeddings/Concat"):
        positions["class token"] = x
      elif node.name.startswith("/backbone/embeddings/Reshape") and x.ndim == 3:
        positions["patches"] = x
  if len(positions) == 2:  # Split, for images of other sizes.
    tensors[_POSITIONS] = np.concatenate(
      [positions["class token"], positions["patches"]], axis=1
    )
  if _POSITIONS not in tensors:
    raise errors.UserError(
      f"{path}: not an export of Dinov2Model (no position embeddings); convert"
      " the model that it was exported from"
    )
  return tensors
