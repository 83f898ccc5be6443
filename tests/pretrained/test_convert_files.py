"""Files of other libraries are converted strictly; errors are one line.

The files have the libraries' names and shapes, but were not written by them:
test_convert.py compares with the libraries.
"""

import json
import os

import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import input_stats
from rescalevit_jax.pretrained import param_keys

safetensors = pytest.importorskip("safetensors.numpy")

HEADS = 3
SIZES = dict(
  num_classes=5,
  image_size=32,
  patch_size=8,
  hidden_size=48,
  mlp_dim=96,
  num_heads=HEADS,
)
POSITIONS = "Transformer/posembed_input/pos_embedding"
HALF = ((0.5,) * 3, (0.5,) * 3)


def our_arrays(**options):
  """Return random arrays with Google's names."""
  params, _ = trees.fresh(**SIZES | options)
  return {k: np.array(v) for k, v in param_keys.flatten(params, {}).items()}


def tensors(family="timm", **options):
  """Return random tensors with the names of a family."""
  return families.write(our_arrays(**options), family)


def save(found, folder, **config):
  """Write tensors, and a config.json beside them."""
  path = folder / "a.safetensors"
  safetensors.save_file(found, path)
  if config:
    (folder / "config.json").write_text(json.dumps(config))
  return path


def assert_refused(words, path, **options):
  options = {"heads": HEADS, "normalization": HALF} | options
  with pytest.raises(errors.UserError, match=words):
    convert.convert(path, **options)


def test_a_rectangular_grid_is_refused(tmp_path):
  found = tensors() | {"pos_embed": np.zeros((1, 1 + 4 * 2, 48), np.float32)}
  assert_refused("square", save(found, tmp_path))


@pytest.mark.parametrize("shape", [(17,), (17, 48)])
def test_other_axes_of_positions_are_refused(shape, tmp_path):
  x = np.zeros(shape, np.float32)
  words = r"position embeddings have the shape \[17"
  assert_refused(words, save(tensors() | {"pos_embed": x}, tmp_path))
  path = tmp_path / "a.npz"
  kernel = np.zeros((8, 8, 3, 48))
  np.savez(path, **{"embedding/kernel": kernel, "cls": 0, "pos_embedding": x})
  assert_refused(words, path, heads=None, normalization=None)


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 18, 48)])
def test_other_sizes_of_positions_are_refused(shape, tmp_path):
  x = np.zeros(shape, np.float32)
  found = tensors() | {"pos_embed": x, "dist_token": x[:1, :1]}
  path = save(found, tmp_path)
  assert_refused("position embeddings", path, drop_distillation=True)


def test_a_patch_bias_of_another_length_is_refused(tmp_path):
  found = tensors() | {"patch_embed.proj.bias": np.zeros(7, np.float32)}
  assert_refused("bias and kernel have different", save(found, tmp_path))


@pytest.mark.parametrize("suffix", ["npz", "onnx", "safetensors"])
def test_a_pipe_is_refused(suffix, tmp_path):
  path = tmp_path / f"a.{suffix}"
  os.mkfifo(path)
  assert_refused("not a file", path, heads=None, normalization=None)


def test_a_missing_tensor_is_named(tmp_path):
  found = tensors()
  del found["blocks.1.mlp.fc2.bias"]
  assert_refused(r"encoderblock_1/.*Dense_1/bias", save(found, tmp_path))


def test_unknown_normalization_is_refused(tmp_path):
  path = save(tensors(), tmp_path)
  assert_refused("give --mean and --std", path, normalization=None)


def test_there_must_be_a_distillation_token_to_drop(tmp_path):
  path = save(tensors(), tmp_path)
  assert_refused("no distillation token", path, drop_distillation=True)


def test_the_head_of_deit_with_a_teacher_is_kept(tmp_path):
  found = tensors("huggingface")
  head = {k: found.pop(k) for k in [*found] if k.startswith("classifier.")}
  found = {f"deit.{k}": x for k, x in found.items()}
  found |= {f"cls_{k}": x for k, x in head.items()}
  found |= {f"distillation_{k}": x for k, x in head.items()}
  found["deit.embeddings.distillation_token"] = np.zeros((1, 1, 48), np.float32)
  positions = found["deit.embeddings.position_embeddings"]
  found["deit.embeddings.position_embeddings"] = np.insert(
    positions, 1, 0, axis=1
  )
  arrays = convert.convert(
    save(found, tmp_path),
    heads=HEADS,
    normalization=HALF,
    drop_distillation=True,
  )
  np.testing.assert_array_equal(
    arrays["head/kernel"], head["classifier.weight"].T
  )
  np.testing.assert_array_equal(arrays[POSITIONS], positions)


def test_big_vision_gives_the_same_arrays(tmp_path):
  """big_vision stacks blocks and has no position for the class token."""
  expected = our_arrays()
  expected[POSITIONS][:, 0] = 0
  arrays = {
    f"params/{k}": v
    for k, v in expected.items()
    if "encoderblock" not in k and k != POSITIONS
  }
  arrays["params/pos_embedding"] = expected[POSITIONS][:, 1:]
  for key in expected:
    if not key.startswith("Transformer/encoderblock_0/"):
      continue
    blocks = [expected[key.replace("_0/", f"_{i}/", 1)] for i in range(2)]
    for old, new in trees.NEW_NUMBERING.items():
      key = key.replace(old, new)
    name = key.replace("encoderblock_0", "encoderblock")
    arrays[f"params/{name}"] = np.stack(blocks)
  path = tmp_path / "a.npz"
  np.savez(path, **arrays)
  found = convert.convert(path)
  assert_refused("takes no options", path)
  assert found.keys() == expected.keys()
  for key, x in expected.items():
    np.testing.assert_array_equal(found[key], x, err_msg=key)
  np.savez(path, **arrays | {f"params/{name}": np.float32(1)})
  assert_refused("a single number", path, heads=None, normalization=None)


@pytest.mark.parametrize("name", families.TABLES)
def test_writing_and_reading_are_inverse(name):
  arrays = our_arrays(
    residual="layerscale" if name != "huggingface" else "plain",
    num_layers=12,  # Indices with two digits.
  )
  if name == "huggingface-dinov2":
    arrays = {k: v for k, v in arrays.items() if not k.startswith("head/")}
  back = families.read(families.write(arrays, name), name, HEADS, "a")
  assert back.keys() == arrays.keys()
  for key, x in arrays.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


def test_pooling_of_the_config_is_printed(tmp_path, capsys):
  """Only config.json of timm tells the pooling."""
  statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
  path = save(tensors(), tmp_path, global_pool="avg", pretrained_cfg=statistics)
  assert convert.main([str(path), f"--heads={HEADS}"]) == 0
  assert "--config.model.pool=gap" in capsys.readouterr().out


@pytest.mark.parametrize(
  "name, expected", [("gelu", ""), ("gelu_new", "--config.model.gelu=tanh")]
)
def test_gelu_of_the_config_is_printed(name, expected, tmp_path, capsys):
  path = save(tensors(), tmp_path, hidden_act=name)
  flags = [str(path), f"--heads={HEADS}", "--mean=0.5", "--std=0.5"]
  assert convert.main(flags) == 0
  out = capsys.readouterr().out
  assert expected in out and ("model.gelu" in out) == bool(expected)
  save(tensors(), tmp_path, hidden_act="relu")
  assert convert.main([*flags, f"--output={tmp_path}/b.npz"]) == 1
  assert "activation relu" in capsys.readouterr().err


def test_wide_models_have_no_default_heads():
  """The number of heads is ambiguous: ViT-H has 16 heads of 80 channels."""
  assert convert._default_heads(1024, "a") == 16
  with pytest.raises(errors.UserError, match="give --heads"):
    convert._default_heads(1280, "a")


@pytest.mark.parametrize(
  "mean, std", [("imagenet", "0.5"), ("0.5", "imagenet"), (None, "imagenet")]
)
def test_mean_or_std_alone_is_refused(mean, std):
  with pytest.raises(errors.UserError, match="without --std"):
    input_stats.parse(mean, std)


@pytest.mark.parametrize(
  "statistics",
  [
    None,
    {"mean": None, "std": None},
    {"mean": [0.5] * 3, "std": [0.0] * 3},
    {"mean": [0.5, 0.5], "std": [0.5, 0.5]},
  ],
)
def test_null_normalization_is_refused(statistics, tmp_path):
  path = save(tensors(), tmp_path, pretrained_cfg=statistics)
  assert_refused("give --mean", path, normalization=None)


def test_do_normalize_false_is_honored(tmp_path):
  path = save(tensors(), tmp_path)
  file = tmp_path / "preprocessor_config.json"
  file.write_text(
    json.dumps({"do_normalize": False, "image_mean": [0.5], "image_std": [0.5]})
  )
  found = convert.convert(path, heads=HEADS)
  expected = convert.convert(
    path, heads=HEADS, normalization=([0] * 3, [1] * 3)
  )
  np.testing.assert_equal(found, expected)
  for text in ("{", "3", "[]"):
    file.write_text(text)
    assert_refused("not a JSON object", path, normalization=None)


def test_a_file_without_a_final_norm_is_refused(tmp_path):
  found = tensors()
  del found["norm.weight"]
  assert_refused("no final", save(found, tmp_path))


def test_gray_inputs_are_refused(tmp_path):
  x = np.zeros((48, 1, 8, 8), np.float32)
  found = tensors() | {"patch_embed.proj.weight": x}
  assert_refused("has 1 input", save(found, tmp_path))


@pytest.mark.parametrize(
  "name, shape, advice",
  [
    ("attn.qkv.weight", (3 * 48 - 1, 48), ""),
    ("attn.qkv.weight", (3 * 48,), "check --heads"),
    ("attn.qkv.weight", (), ""),
    ("attn.proj.weight", (48,), "check --heads"),
    ("mlp.fc1.weight", (96,), "choose another file"),
    ("norm1.weight", (1, 48), "choose another file"),
  ],
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, shape, advice):
  found = tensors() | {f"blocks.0.{name}": np.zeros(shape, np.float32)}
  path = save(found, tmp_path)
  for heads in (HEADS, 1):
    assert_refused(f"has the shape .*{advice}", path, heads=heads)


def test_a_patch_embedding_of_two_axes_is_refused(tmp_path):
  x = np.zeros((48, 192), np.float32)
  found = tensors() | {"patch_embed.proj.weight": x}
  assert_refused(r"\(2 axes\); choose another file", save(found, tmp_path))


def test_a_layer_scale_of_another_length_is_refused(tmp_path):
  found = tensors(residual="layerscale")
  found["blocks.1.ls2.gamma"] = np.ones(7, np.float32)
  path = save(found, tmp_path)
  assert_refused(
    r"safetensors: .*encoderblock_1/LayerScale_2/scale has the shape \[7\]",
    path,
    fold_layer_scale=True,
  )
