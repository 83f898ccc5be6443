"""Exported weights give the same logits in timm's VisionTransformer."""

import functools

import jax
import numpy as np
import pytest
import trees

from rescalevit_jax import models
from rescalevit_jax.models.ops import normalization
from rescalevit_jax.pretrained import npz

_REASON = "needs torch and timm: pip install -e '.[timm]'"
torch = pytest.importorskip("torch", reason=_REASON)
vision_transformer = pytest.importorskip(
  "timm.models.vision_transformer", reason=_REASON
)


@pytest.mark.parametrize(
  "image_size, classes, sizes",
  [
    (32, 10, dict(patch_size=4, hidden_size=48, num_heads=3, num_layers=3)),
    (48, 3, dict(patch_size=8, hidden_size=64, num_heads=2, num_layers=6)),
    (32, 5, dict(patch_size=16, hidden_size=96, num_heads=8, num_layers=1)),
  ],
)
def test_logits_equal_timms(image_size, classes, sizes, tmp_path):
  sizes = {**sizes, "mlp_dim": 80}
  model = models.create(
    "ViT-B_16",
    num_classes=classes,
    norm="LN",
    gelu="erf",
    image_size=image_size,
    **sizes,
  )
  rng = np.random.default_rng(0)
  shape = (5, image_size, image_size, 3)
  images = rng.uniform(-1, 1, shape).astype(np.float32)
  # All parameters are random: neither the head nor a bias is zero.
  params, _ = trees.fresh(num_classes=classes, image_size=image_size, **sizes)
  # The initial tokens are small enough to reveal the norm's epsilon.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x * (0.2 if "encoder" in str(path) else 0.01), params
  )
  params["head"] = jax.tree.map(lambda x: 20 * x, params["head"])
  expected = np.asarray(jax.jit(model.apply)({"params": params}, images))
  assert np.ptp(expected, axis=0).min() > 0.01  # Logits depend on the image.

  npz.save(tmp_path / "a.npz", params, {})
  theirs = vision_transformer.VisionTransformer(
    img_size=image_size,
    patch_size=sizes["patch_size"],
    embed_dim=sizes["hidden_size"],
    depth=sizes["num_layers"],
    num_heads=sizes["num_heads"],
    mlp_ratio=sizes["mlp_dim"] / sizes["hidden_size"],
    num_classes=classes,
    class_token=True,
    global_pool="token",
    # timm's default, explicit because the logits depend on it.
    norm_layer=functools.partial(torch.nn.LayerNorm, eps=normalization.EPSILON),
    act_layer=torch.nn.GELU,
  ).eval()
  theirs.load_pretrained(str(tmp_path / "a.npz"))
  with torch.no_grad():
    found = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_epsilon_is_googles():
  layer = vision_transformer.VisionTransformer(depth=1, embed_dim=12).norm
  assert layer.eps == normalization.EPSILON
