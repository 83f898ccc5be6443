"""Converted checkpoints of other libraries give the same logits."""

import functools
import json

import jax
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import input_stats
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import param_keys

torch = pytest.importorskip("torch", reason="needs the extra convert")
safetensors = pytest.importorskip("safetensors.torch")
timm_vit = pytest.importorskip(
  "timm.models.vision_transformer", reason="needs timm"
)

SIZES = dict(patch_size=8, hidden_size=48, mlp_dim=96, num_layers=2)
HEADS = 3
IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 32, 32, 3))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def randomize(module):
  """Set every tensor to random values."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for x in module.state_dict().values():
      if x.dtype.is_floating_point:
        x.copy_(0.2 * torch.randn(x.shape, generator=generator))
  return module.eval()


def timm_model(**kwargs):
  return randomize(
    timm_vit.VisionTransformer(
      img_size=32,
      patch_size=8,
      embed_dim=48,
      depth=2,
      num_heads=HEADS,
      mlp_ratio=2,
      num_classes=5,
      **kwargs,
    )
  )


def save(module, path):
  if path.suffix == ".safetensors":
    safetensors.save_file(
      {k: v.contiguous() for k, v in module.state_dict().items()}, path
    )
  else:
    torch.save({"model": module.state_dict(), "epoch": 3}, path)
  return path


def theirs(module, normalization, output=lambda x: x):
  """Compute the library's output for normalized images in [0, 1]."""
  mean, std = map(np.asarray, normalization)
  x = ((IMAGES - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
  with torch.no_grad():
    return output(module(torch.from_numpy(x))).numpy()


def ours(arrays, tmp_path, residual="plain"):
  """Compute our output for the same images in [-1, 1].

  Without a head, return the features of the class token.
  """
  classes = arrays["head/bias"].size if "head/bias" in arrays else 48
  if "head/bias" not in arrays:
    arrays = arrays | {
      "head/kernel": np.eye(48, dtype=np.float32),
      "head/bias": np.zeros(48, np.float32),
    }
  path = tmp_path / "converted.npz"
  np.savez(path, **arrays)
  model = models.create(
    "ViT-B_16",
    num_classes=classes,
    image_size=32,
    num_heads=HEADS,
    gelu="erf",
    residual=residual,
    dtype="float32",
    **SIZES,
  )
  like = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    np.zeros((1, 32, 32, 3), np.float32),
  )
  params, _, report = load.load(str(path), like["params"], {})
  assert not report.initial
  x = (2 * IMAGES - 1).astype(np.float32)
  return np.asarray(jax.jit(model.apply)({"params": params}, x))


def assert_equal(found, expected):
  assert np.ptp(expected, axis=0).min() > 1e-4  # Outputs depend on the image.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
  "kwargs, residual",
  [
    ({}, "plain"),
    ({"init_values": 0.1}, "layerscale"),
    ({"qkv_bias": False}, "plain"),
    ({"no_embed_class": True}, "plain"),
  ],
)
def test_timm_gives_the_same_logits(kwargs, residual, suffix, tmp_path):
  module = timm_model(**kwargs)
  arrays = convert.convert(
    save(module, tmp_path / f"a{suffix}"),
    heads=HEADS,
    normalization=IMAGENET,
    no_class_position="no_embed_class" in kwargs,
  )
  expected = theirs(module, IMAGENET)
  assert_equal(ours(arrays, tmp_path, residual), expected)


def test_folded_layer_scale_gives_the_same_logits(tmp_path):
  module = timm_model(init_values=0.1)
  arrays = convert.convert(
    save(module, tmp_path / "a.pth"),
    heads=HEADS,
    normalization=IMAGENET,
    fold_layer_scale=True,
  )
  assert not any("LayerScale" in key for key in arrays)
  assert_equal(ours(arrays, tmp_path), theirs(module, IMAGENET))


class TestHuggingFace:
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra convert"
  )
  CONFIG = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    intermediate_size=96,
    image_size=32,
    patch_size=8,
  )

  def saved(self, kind, tmp_path, **kwargs):
    """Save a random model with the two configs of Hugging Face."""
    t = self.transformers
    config = getattr(t, f"{kind}Config")(**self.CONFIG, **kwargs)
    head = "Model" if kind == "Dinov2" else "ForImageClassification"
    module = randomize(getattr(t, f"{kind}{head}")(config))
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
      json.dumps({"image_mean": IMAGENET[0], "image_std": IMAGENET[1]})
    )
    return module, tmp_path / "model.safetensors"

  @pytest.mark.parametrize("epsilon", [1e-12, 1e-6])
  def test_vit_gives_the_same_logits(self, epsilon, tmp_path):
    module, path = self.saved(
      "ViT", tmp_path, num_labels=5, layer_norm_eps=epsilon
    )
    arrays = convert.convert(path)
    expected = theirs(module, IMAGENET, lambda x: x.logits)
    found = ours(arrays, tmp_path)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

  def test_dinov2_gives_the_same_features(self, tmp_path):
    module, path = self.saved(
      "Dinov2", tmp_path, mlp_ratio=2, layer_norm_eps=1e-6
    )
    arrays = convert.convert(path)
    expected = theirs(module, IMAGENET, lambda x: x.last_hidden_state[:, 0])
    assert_equal(ours(arrays, tmp_path, "layerscale"), expected)

  def test_a_distilled_deit_is_refused_unless_asked_for(self, tmp_path):
    _, path = self.saved("DeiT", tmp_path, num_labels=5)
    with pytest.raises(errors.UserError, match="--drop_distillation"):
      convert.convert(path)
    arrays = convert.convert(path, drop_distillation=True)
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    assert positions.shape == (1, 17, 48)

  def test_a_gated_mlp_is_refused(self, tmp_path):
    _, path = self.saved("Dinov2", tmp_path, use_swiglu_ffn=True)
    with pytest.raises(errors.UserError, match="gated MLP"):
      convert.convert(path)


@pytest.mark.parametrize(
  "kwargs, words",
  [
    ({"reg_tokens": 4}, "register tokens"),
    ({"qk_norm": True}, "normalized queries and keys"),
    ({"global_pool": "avg"}, "a norm after pooling"),
    ({"pre_norm": True}, "a norm before the blocks"),
  ],
)
def test_variants_of_the_architecture_are_refused(kwargs, words, tmp_path):
  path = save(timm_model(**kwargs), tmp_path / "a.safetensors")
  with pytest.raises(errors.UserError, match=words):
    convert.convert(path, heads=HEADS, normalization=IMAGENET)


def test_a_rectangular_grid_is_refused(tmp_path):
  module = timm_vit.VisionTransformer(
    img_size=(32, 16), patch_size=8, embed_dim=48, depth=1, num_heads=HEADS
  )
  path = save(module, tmp_path / "a.safetensors")
  with pytest.raises(errors.UserError, match="square"):
    convert.convert(path, heads=HEADS, normalization=IMAGENET)


def test_a_missing_tensor_is_named(tmp_path):
  module = timm_model()
  tensors = dict(module.state_dict())
  del tensors["blocks.1.mlp.fc2.bias"]
  torch.save(tensors, tmp_path / "a.pth")
  with pytest.raises(errors.UserError, match=r"encoderblock_1/.*Dense_1/bias"):
    convert.convert(tmp_path / "a.pth", heads=HEADS, normalization=IMAGENET)


def test_a_pickle_is_refused(tmp_path):
  class Attack:
    def __reduce__(self):
      return (print, ("attacked",))

  torch.save({"model": Attack()}, tmp_path / "a.pth")
  with pytest.raises(errors.UserError, match="cannot be read"):
    convert.convert(tmp_path / "a.pth")


def test_unknown_normalization_is_refused(tmp_path):
  path = save(timm_model(), tmp_path / "a.safetensors")
  with pytest.raises(errors.UserError, match="give --mean and --std"):
    convert.convert(path, heads=HEADS)


def test_command_converts_and_does_not_overwrite(tmp_path, capsys):
  module = timm_model()
  path = save(module, tmp_path / "a.safetensors")
  flags = [str(path), f"--heads={HEADS}", "--mean=0.5", "--std=0.5"]
  assert convert.main(flags) == 0
  assert "--config.pretrained_path=" in capsys.readouterr().out
  with np.load(tmp_path / "a.npz") as arrays:
    found = ours(dict(arrays), tmp_path)
  half = ((0.5,) * 3, (0.5,) * 3)
  assert_equal(found, theirs(module, half))
  assert convert.main(flags) == 1
  assert "exists already" in capsys.readouterr().err


def test_big_vision_gives_the_same_logits(tmp_path):
  """big_vision stacks blocks and has no position for the class token."""
  params, _ = trees.fresh(
    num_classes=5, image_size=32, num_heads=HEADS, **SIZES
  )
  positions = "Transformer/posembed_input/pos_embedding"
  expected = {k: np.array(v) for k, v in param_keys.flatten(params, {}).items()}
  expected[positions][:, 0] = 0
  arrays = {
    f"params/{k}": v
    for k, v in expected.items()
    if "encoderblock" not in k and k != positions
  }
  arrays["params/pos_embedding"] = expected[positions][:, 1:]
  for key in expected:
    if not key.startswith("Transformer/encoderblock_0/"):
      continue
    blocks = [expected[key.replace("_0/", f"_{i}/", 1)] for i in range(2)]
    for old, new in trees.NEW_NUMBERING.items():
      key = key.replace(old, new)
    name = key.replace("encoderblock_0", "encoderblock")
    arrays[f"params/{name}"] = np.stack(blocks)
  np.savez(tmp_path / "a.npz", **arrays)
  found = convert.convert(tmp_path / "a.npz")
  with pytest.raises(errors.UserError, match="takes no options"):
    convert.convert(tmp_path / "a.npz", heads=HEADS)
  assert found.keys() == expected.keys()
  for key, x in expected.items():
    np.testing.assert_array_equal(found[key], x, err_msg=key)


@pytest.mark.parametrize("name", families.TABLES)
def test_writing_and_reading_are_inverse(name):
  params, _ = trees.fresh(
    num_classes=5,
    image_size=32,
    num_heads=HEADS,
    residual="layerscale" if name != "huggingface" else "plain",
    **SIZES | {"num_layers": 12},  # Indices with two digits.
  )
  arrays = {k: np.asarray(v) for k, v in param_keys.flatten(params, {}).items()}
  if name == "huggingface-dinov2":
    arrays = {k: v for k, v in arrays.items() if not k.startswith("head/")}
  tensors = families.write(arrays, name)
  back = families.read(tensors, name, HEADS, "a")
  assert back.keys() == arrays.keys()
  for key, x in arrays.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


def test_written_tensors_equal_timms(tmp_path):
  module = timm_model(init_values=0.1)
  arrays = convert.convert(
    save(module, tmp_path / "a.pth"),
    heads=HEADS,
    normalization=((0.5,) * 3, (0.5,) * 3),
  )
  tensors = families.write(arrays, "timm")
  expected = module.state_dict()
  assert tensors.keys() == expected.keys()
  for key, x in tensors.items():
    np.testing.assert_allclose(x, expected[key].numpy(), rtol=1e-6, atol=1e-7)


def test_pooling_of_the_config_is_printed(tmp_path, capsys):
  """Only config.json of timm tells the pooling."""
  path = tmp_path / "a.safetensors"
  save(timm_model(global_pool="avg", fc_norm=False), path)
  config = {
    "global_pool": "avg",
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert convert.main([str(path), f"--heads={HEADS}"]) == 0
  assert "--config.model.pool=gap" in capsys.readouterr().out


@pytest.mark.parametrize(
  "name, expected", [("gelu", ""), ("gelu_new", "--config.model.gelu=tanh")]
)
def test_gelu_of_the_config_is_printed(name, expected, tmp_path, capsys):
  path = save(timm_model(), tmp_path / "a.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({"hidden_act": name}))
  flags = [str(path), f"--heads={HEADS}", "--mean=0.5", "--std=0.5"]
  assert convert.main(flags) == 0
  out = capsys.readouterr().out
  assert expected in out and ("model.gelu" in out) == bool(expected)
  (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
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
  "config",
  [
    {"pretrained_cfg": None},
    {"pretrained_cfg": {"mean": None, "std": None}},
    {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.0] * 3}},
    {"pretrained_cfg": {"mean": [0.5, 0.5], "std": [0.5, 0.5]}},
  ],
)
def test_null_normalization_is_refused(config, tmp_path):
  save(timm_model(), tmp_path / "a.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="give --mean"):
    convert.convert(tmp_path / "a.safetensors", heads=HEADS)


def test_do_normalize_false_is_honored(tmp_path):
  path = tmp_path / "a.safetensors"
  save(timm_model(), path)
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
    with pytest.raises(errors.UserError, match="not a JSON object"):
      convert.convert(path, heads=HEADS)


@pytest.mark.parametrize(
  "key, words", [("norm.weight", "no final"), ("in_chans", "has 1 input")]
)
def test_unsupported_models_are_refused(key, words, tmp_path):
  module = timm_model(**({"in_chans": 1} if key == "in_chans" else {}))
  state = module.state_dict()
  state.pop(key, None)
  path = tmp_path / "a.safetensors"
  safetensors.save_file(state, path)
  with pytest.raises(errors.UserError, match=words):
    convert.convert(path, heads=HEADS, normalization=IMAGENET)


@pytest.mark.parametrize(
  "name, shape",
  [
    ("attn.qkv.weight", (3 * 48 - 1, 48)),
    ("attn.qkv.weight", (3 * 48,)),
    ("attn.qkv.weight", ()),
    ("attn.proj.weight", (48,)),
    ("mlp.fc1.weight", (96,)),
    ("norm1.weight", (1, 48)),
  ],
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, shape):
  state = timm_model().state_dict()
  state[f"blocks.0.{name}"] = torch.zeros(shape)
  path = tmp_path / "a.safetensors"
  safetensors.save_file(state, path)
  for heads in (HEADS, 1):
    with pytest.raises(errors.UserError, match="has the shape"):
      convert.convert(path, heads=heads, normalization=IMAGENET)
