"""Detection of the model that a checkpoint belongs to."""

import re

import numpy as np
import pytest
import trees

from rescalevit_jax.pretrained import detect


def test_another_known_model_is_named(tmp_path):
  sizes = dict.fromkeys(trees.TINY)
  theirs = trees.fresh(name="ViT-XS_2", **sizes)
  ours = trees.fresh(name="ViT-XS_4", norm="Rescale", **sizes)
  message = trees.refuses(
    trees.write(tmp_path, trees.flat(*theirs)),
    "is a ViT-XS_2 checkpoint (patch 2, hidden 64, MLP 256, 4 heads, 4",
    "the model is ViT-XS_4 (patch 4,",
    "choose --config.model_name=ViT-XS_2",
    target=ours,
  )
  assert "embedding/kernel" not in message


def test_message_for_loading_b32_into_b16():
  theirs, ours = (
    trees.flat(*trees.shapes(name, 224, (("num_classes", 10),)))
    for name in ("ViT-B_32", "ViT-B_16")
  )
  assert detect.size_mismatch("b.npz", theirs, ours, "details") == (
    "b.npz: this is a ViT-B_32 checkpoint (patch 32, hidden 768, MLP 3072, 12"
    " heads, 12 layers), the model is ViT-B_16 (patch 16, hidden 768, MLP"
    " 3072, 12 heads, 12 layers); choose --config.model_name=ViT-B_32"
  )
  assert detect.size_mismatch("b.npz", ours, ours, "details") is None


@pytest.mark.parametrize(
  "size, value, described",
  [
    ("patch_size", 2, "patch 2, hidden 8, MLP 16, 2 heads, 2 layers"),
    ("hidden_size", 12, "patch 4, hidden 12, MLP 16, 2 heads, 2 layers"),
    ("mlp_dim", 32, "patch 4, hidden 8, MLP 32, 2 heads, 2 layers"),
    ("num_heads", 4, "patch 4, hidden 8, MLP 16, 4 heads, 2 layers"),
    ("num_layers", 1, "patch 4, hidden 8, MLP 16, 2 heads, 1 layers"),
    ("num_layers", 3, "patch 4, hidden 8, MLP 16, 2 heads, 3 layers"),
  ],
)
def test_unknown_sizes_are_described_by_numbers(
  size, value, described, tmp_path
):
  path = trees.write(tmp_path, trees.arrays(**{size: value}))
  message = trees.refuses(
    path, described, "(patch 4, hidden 8, MLP 16, 2 heads, 2 layers)"
  )
  assert "choose" not in message
  assert re.search(r"shape.*\(\d+,.*\)", message)


@pytest.mark.parametrize(
  "key, shapes",
  [
    ("cls", [(1, 1, 7), (1, 1, 9)]),
    (trees.BLOCK + "MlpBlock_3/Dense_0/kernel", [(8, 15), (8, 17)]),
    (
      trees.BLOCK + "MultiHeadDotProductAttention_1/query/kernel",
      [(8, 1, 4), (8, 4, 4)],
    ),
  ],
)
def test_one_misshapen_array_is_not_another_model(key, shapes, tmp_path):
  for shape in shapes:
    arrays = trees.arrays() | {key: np.ones(shape, np.float32)}
    message = trees.refuses(
      trees.write(tmp_path, arrays), "does not fit the model", key, str(shape)
    )
    assert "checkpoint" not in message
