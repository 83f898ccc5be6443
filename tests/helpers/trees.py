"""Small parameter trees, checkpoint files, and checks of the loader."""

import functools
import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.pretrained import load

TINY = dict(patch_size=4, hidden_size=8, mlp_dim=16, num_heads=2, num_layers=2)
# The sizes of the reference numbers.
SMALL = dict(
  patch_size=8, hidden_size=32, mlp_dim=128, num_heads=4, num_layers=4
)
POSITIONS = "Transformer/posembed_input/pos_embedding"
BLOCK = "Transformer/encoderblock_0/"
HEAD = {"head/kernel", "head/bias"}
NEW_NUMBERING = {
  "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
  "MlpBlock_3": "MlpBlock_0",
  "LayerNorm_2": "LayerNorm_1",
}


@functools.cache
def shapes(name, image_size, settings):
  """Return the shapes of a model's `params` and `batch_stats`."""
  model = models.create(name, image_size=image_size, **dict(settings))
  images = np.zeros((1, image_size, image_size, 3), np.float32)
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
  return tree["params"], tree.get("batch_stats", {})


def fresh(
  norm="LN", num_classes=3, image_size=8, seed=0, name="ViT-B_16", **sizes
):
  """Return random `params` and `batch_stats` of a tiny model."""
  settings = dict(TINY, norm=norm, num_classes=num_classes) | sizes
  rng = np.random.default_rng(seed)

  def fill(leaf):
    if np.issubdtype(leaf.dtype, np.integer):
      return np.asarray(seed, leaf.dtype)
    return rng.normal(size=leaf.shape).astype(leaf.dtype)

  trees = shapes(name, image_size, tuple(settings.items()))
  return tuple(jax.tree.map(fill, tree) for tree in trees)


def flat(params, batch_stats):
  """Return the leaves by their keys in a file."""
  both = {**params, "batch_stats": batch_stats}
  return traverse_util.flatten_dict(both, sep="/")


def arrays(norm="LN", **kwargs):
  """Return random arrays of a tiny model by their keys in a file."""
  return flat(*fresh(norm, **kwargs))


def stats_keys(arrays):
  return {k for k in arrays if k.startswith("batch_stats/")}


def write(folder: pathlib.Path, arrays, name="file.npz"):
  """Write arrays to an `.npz` and return its path."""
  np.savez(folder / name, **arrays)
  return folder / name


def same(got, expected):
  """Assert equal keys, values and types."""
  assert got.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(got[key], value, err_msg=key)
    assert got[key].dtype == value.dtype, key


def refuses(path, *parts, target=None, **kwargs):
  """Assert a UserError of one line that contains the path and the parts."""
  target = fresh(seed=1) if target is None else target
  with pytest.raises(errors.UserError) as caught:
    load.load(path, *target, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  assert str(path) in message
  # The temporary path may contain a part by chance.
  for part in parts:
    assert part in message.replace(str(path), "")
  return message
