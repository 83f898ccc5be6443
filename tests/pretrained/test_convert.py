"""Converted checkpoints of other libraries give the same logits."""

import functools
import json

import jax
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import load

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


def test_a_pickle_is_refused(tmp_path):
  class Attack:
    def __reduce__(self):
      return (print, ("attacked",))

  torch.save({"model": Attack()}, tmp_path / "a.pth")
  with pytest.raises(errors.UserError, match="cannot be read"):
    convert.convert(tmp_path / "a.pth")


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
