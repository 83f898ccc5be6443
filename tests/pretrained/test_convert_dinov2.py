"""DINOv2 from an ONNX file: the same function under Google's names."""

import jax
import numpy as np
import pytest

from rescalevit_jax import models
from rescalevit_jax.pretrained import convert_dinov2

WIDTH, MLP, LAYERS, PATCH, EDGE = 128, 32, 2, 2, 2


@pytest.fixture
def theirs():
  rng = np.random.default_rng(0)
  shapes = {
    "embeddings.cls_token": (1, 1, WIDTH),
    "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    "cls_position": (1, 1, WIDTH),
    "positions": (1, EDGE**2, WIDTH),
    "layernorm.weight": (WIDTH,),
    "layernorm.bias": (WIDTH,),
  }
  for i in range(LAYERS):
    layers = {
      **{
        f"attention.{name}": (WIDTH, WIDTH)
        for name in (
          "attention.query",
          "attention.key",
          "attention.value",
          "output.dense",
        )
      },
      "mlp.fc1": (WIDTH, MLP),
      "mlp.fc2": (MLP, WIDTH),
    }
    for name, shape in layers.items():
      shapes[f"encoder.layer.{i}.{name}.weight"] = shape
      shapes[f"encoder.layer.{i}.{name}.bias"] = shape[1:]
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
      shapes[f"encoder.layer.{i}.{name}"] = (WIDTH,)
    for scale in (1, 2):
      shapes[f"encoder.layer.{i}.layer_scale{scale}.lambda1"] = (WIDTH,)
  return {
    k: rng.normal(size=shape, scale=0.3).astype(np.float32)
    for k, shape in shapes.items()
  }


def reference(w, images):
  """Compute DINOv2's class-token features in NumPy, images in [0, 1]."""
  from scipy import special

  def norm(x, name):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1)[..., None] + 1e-6)
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]

  def dense(x, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

  x = (images - convert_dinov2._MEAN) / convert_dinov2._STD
  x = x.reshape(len(x), EDGE, PATCH, EDGE, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
  kernel = w["embeddings.patch_embeddings.projection.weight"]
  x = np.einsum("bhwpqc,dcpq->bhwd", x, kernel).reshape(len(x), -1, WIDTH)
  x = x + w["embeddings.patch_embeddings.projection.bias"] + w["positions"]
  cls = w["embeddings.cls_token"] + w["cls_position"]
  x = np.concatenate([np.repeat(cls, len(x), 0), x], 1)
  for i in range(LAYERS):
    layer = f"encoder.layer.{i}."
    h = norm(x, f"{layer}norm1")
    q, k, v = (
      dense(h, f"{layer}attention.attention.{name}").reshape(
        *h.shape[:2], -1, 64
      )
      for name in ("query", "key", "value")
    )
    maps = special.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 8, axis=-1)
    h = np.einsum("bhqk,bkhd->bqhd", maps, v).reshape(x.shape)
    h = dense(h, f"{layer}attention.output.dense")
    x = x + h * w[f"{layer}layer_scale1.lambda1"]
    h = dense(norm(x, f"{layer}norm2"), f"{layer}mlp.fc1")
    h = dense(h * special.ndtr(h), f"{layer}mlp.fc2")
    x = x + h * w[f"{layer}layer_scale2.lambda1"]
  return norm(x, "layernorm")[:, 0]


def test_computes_the_same_features(theirs):
  ours = convert_dinov2.convert(theirs)
  ours["head/kernel"], ours["head/bias"] = np.eye(WIDTH), np.zeros(WIDTH)
  params = {}
  for name, x in ours.items():
    *path, leaf = name.split("/")
    node = params
    for part in path:
      node = node.setdefault(part, {})
    node[leaf] = np.float32(x)
  model = models.create(
    "ViT-B_16",
    num_classes=WIDTH,
    norm="LN",
    image_size=EDGE * PATCH,
    patch_size=PATCH,
    hidden_size=WIDTH,
    mlp_dim=MLP,
    num_heads=WIDTH // 64,
    num_layers=LAYERS,
    dropout_rate=0.0,
    dtype="float32",
  )
  images = np.random.default_rng(1).random((3, 4, 4, 3), np.float32)
  with jax.default_matmul_precision("highest"):
    features = model.apply({"params": params}, 2 * images - 1, train=False)
  np.testing.assert_allclose(features, reference(theirs, images), 2e-4, 2e-4)


def test_reads_kernels_by_the_names_of_their_nodes(theirs, tmp_path):
  onnx = pytest.importorskip("onnx")
  arrays, nodes = [], []

  def add(name, x):
    arrays.append(onnx.numpy_helper.from_array(x, name))

  for i, (name, x) in enumerate(theirs.items()):
    if name.endswith(".weight") and x.ndim == 2:
      add(f"onnx::{i}", x)
      node = name.removesuffix(".weight").replace(".", "/")
      nodes.append(
        onnx.helper.make_node(
          "MatMul",
          ["x", f"onnx::{i}"],
          ["y"],
          name=f"/backbone/{node.replace('layer/', 'layer.')}/MatMul",
        )
      )
    elif "position" in name:
      add(f"onnx::{i}", x)
      kind = "Concat" if name == "cls_position" else "Reshape"
      nodes.append(
        onnx.helper.make_node(
          kind,
          [f"onnx::{i}"],
          ["y"],
          name=f"/backbone/embeddings/{kind}_1",
          **({"axis": 1} if kind == "Concat" else {}),
        )
      )
    else:
      add(f"backbone.{name}", x)
  graph = onnx.helper.make_graph(nodes, "g", [], [], arrays)
  file = tmp_path / "a.onnx"
  onnx.save(onnx.helper.make_model(graph), file)
  output = tmp_path / "a.npz"
  argv = [str(file), f"--output={output}"]
  assert convert_dinov2.main(argv) == 0
  expected = convert_dinov2.convert(theirs)
  with np.load(output) as written:
    assert set(written.files) == set(expected)
    for name in written.files:
      np.testing.assert_allclose(written[name], expected[name], 1e-6)


def test_other_files_are_one_line(tmp_path, capsys):
  onnx = pytest.importorskip("onnx")
  file = tmp_path / "a.onnx"
  file.write_bytes(b"not protobuf")
  argv = [str(file), f"--output={tmp_path / 'a.npz'}"]
  assert convert_dinov2.main(argv) == 1
  graph = onnx.helper.make_graph([], "g", [], [])
  onnx.save(onnx.helper.make_model(graph), file)
  assert convert_dinov2.main(argv) == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  assert "is not an ONNX file" in lines[0] and "has no array" in lines[1]
