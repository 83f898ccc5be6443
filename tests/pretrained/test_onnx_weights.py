"""Weights of an ONNX file, where matrices have no names."""

import numpy as np
import pytest

from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import onnx_weights

onnx = pytest.importorskip("onnx", reason="needs the extra convert")
WIDTH, MLP, LAYERS, PATCH, EDGE = 128, 32, 2, 2, 2


@pytest.fixture
def tensors():
  """Return random tensors by Hugging Face's names."""
  rng = np.random.default_rng(0)
  shapes = {
    "embeddings.cls_token": (1, 1, WIDTH),
    "embeddings.position_embeddings": (1, 1 + EDGE**2, WIDTH),
    "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    "layernorm.weight": (WIDTH,),
    "layernorm.bias": (WIDTH,),
  }
  for i in range(LAYERS):
    layer = f"encoder.layer.{i}."
    for name, shape in {
      "attention.attention.query": (WIDTH, WIDTH),
      "attention.attention.key": (WIDTH, WIDTH),
      "attention.attention.value": (WIDTH, WIDTH),
      "attention.output.dense": (WIDTH, WIDTH),
      "mlp.fc1": (MLP, WIDTH),
      "mlp.fc2": (WIDTH, MLP),
    }.items():
      shapes[f"{layer}{name}.weight"] = shape
      shapes[f"{layer}{name}.bias"] = shape[:1]
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
      shapes[f"{layer}{name}"] = (WIDTH,)
    for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
      shapes[f"{layer}{name}"] = (WIDTH,)
  return {
    name: rng.normal(size=shape, scale=0.3).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(tensors, path):
  """Write the graph that torch's exporter creates from a Dinov2Model."""
  arrays, nodes = [], []

  def add(name, x):
    arrays.append(onnx.numpy_helper.from_array(x, name))

  def node(kind, initializer, name, **kwargs):
    nodes.append(
      onnx.helper.make_node(kind, ["x", initializer], ["y"], name, **kwargs)
    )

  for i, (name, x) in enumerate(tensors.items()):
    if name.endswith(".weight") and x.ndim == 2:
      add(f"onnx::{i}", x.T)
      layer = name.removesuffix(".weight").replace(".", "/")
      layer = layer.replace("layer/", "layer.")
      node("MatMul", f"onnx::{i}", f"/backbone/{layer}/MatMul")
    elif name == "embeddings.position_embeddings":
      add("class_position", x[:, :1])
      add("patch_positions", x[:, 1:])
      node("Concat", "class_position", "/backbone/embeddings/Concat", axis=1)
      node("Reshape", "patch_positions", "/backbone/embeddings/Reshape_1")
    else:
      add(f"backbone.{name}", x)
  graph = onnx.helper.make_graph(nodes, "g", [], [], arrays)
  onnx.save(onnx.helper.make_model(graph), path)
  return path


def test_all_tensors_are_recovered(tensors, tmp_path):
  found = onnx_weights.read(write(tensors, tmp_path / "a.onnx"))
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_conversion_equals_that_of_safetensors(tensors, tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  path = write(tensors, tmp_path / "a.onnx")
  safetensors.save_file(tensors, tmp_path / "a.safetensors")
  half = ((0.5,) * 3, (0.5,) * 3)
  found, expected = (
    convert.convert(x, normalization=half)
    for x in (path, tmp_path / "a.safetensors")
  )
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_other_files_are_one_line_errors(tmp_path, capsys):
  file = tmp_path / "a.onnx"
  file.write_bytes(b"not protobuf")
  assert convert.main([str(file)]) == 1
  graph = onnx.helper.make_graph([], "g", [], [])
  onnx.save(onnx.helper.make_model(graph), file)
  assert convert.main([str(file)]) == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  assert "cannot be read" in lines[0] and "no position" in lines[1]
