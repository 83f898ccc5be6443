"""Names and layouts of Vision Transformers in other libraries.

A family is a table from its tensor names to those of Google's `.npz` files,
with the layout of each. Every layout has an inverse, so each table serves for
reading and for writing.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re

import numpy as np

from rescalevit_jax import errors

Arrays = dict[str, np.ndarray]

_BLOCK = "Transformer/encoderblock_{i}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_MLP = _BLOCK + "MlpBlock_3/"


@dataclasses.dataclass(frozen=True)
class Layout:
  """A conversion from a tensor of torch to an array of flax, and back.

  Attributes:
    read: converts (tensor, heads) to the array.
    write: converts (array, heads) to the tensor.
  """

  read: Callable[[np.ndarray, int], np.ndarray]
  write: Callable[[np.ndarray, int], np.ndarray]


SAME = Layout(lambda x, heads: x, lambda x, heads: x)
MATRIX = Layout(lambda x, heads: x.T, lambda x, heads: x.T)
CONV = Layout(
  lambda x, heads: x.transpose(2, 3, 1, 0),
  lambda x, heads: x.transpose(3, 2, 0, 1),
)
TO_HEADS = Layout(
  lambda x, heads: x.T.reshape(x.shape[1], heads, -1),
  lambda x, heads: x.reshape(x.shape[0], -1).T,
)
TO_HEADS_BIAS = Layout(
  lambda x, heads: x.reshape(heads, -1), lambda x, heads: x.reshape(-1)
)
FROM_HEADS = Layout(
  lambda x, heads: x.T.reshape(heads, -1, x.shape[0]),
  lambda x, heads: x.reshape(-1, x.shape[-1]).T,
)

Table = dict[str, tuple[str, Layout]]


def _affine(name: str, ours: str) -> Table:
  return {
    f"{name}.weight": (f"{ours}/scale", SAME),
    f"{name}.bias": (f"{ours}/bias", SAME),
  }


def _dense(name: str, ours: str) -> Table:
  return {
    f"{name}.weight": (f"{ours}/kernel", MATRIX),
    f"{name}.bias": (f"{ours}/bias", SAME),
  }


def _attention(query: str, key: str, value: str, out: str) -> Table:
  table: Table = {}
  for name, ours in ((query, "query"), (key, "key"), (value, "value")):
    table[f"{name}.weight"] = (f"{_ATTENTION}{ours}/kernel", TO_HEADS)
    table[f"{name}.bias"] = (f"{_ATTENTION}{ours}/bias", TO_HEADS_BIAS)
  table[f"{out}.weight"] = (_ATTENTION + "out/kernel", FROM_HEADS)
  table[f"{out}.bias"] = (_ATTENTION + "out/bias", SAME)
  return table


def _embedding(cls: str, positions: str, patches: str) -> Table:
  return {
    cls: ("cls", SAME),
    positions: ("Transformer/posembed_input/pos_embedding", SAME),
    f"{patches}.weight": ("embedding/kernel", CONV),
    f"{patches}.bias": ("embedding/bias", SAME),
  }


def _layer_scale(attention: str, mlp: str) -> Table:
  return {
    attention: (_BLOCK + "LayerScale_0/scale", SAME),
    mlp: (_BLOCK + "LayerScale_2/scale", SAME),
  }


# timm, DeiT, DINO and DINOv2 (facebookresearch).
TIMM: Table = {
  **_embedding("cls_token", "pos_embed", "patch_embed.proj"),
  **_affine("blocks.{i}.norm1", _BLOCK + "LayerNorm_0"),
  **_attention(
    # Stored as one tensor: see `split_qkv`.
    "blocks.{i}.attn.q",
    "blocks.{i}.attn.k",
    "blocks.{i}.attn.v",
    "blocks.{i}.attn.proj",
  ),
  **_layer_scale("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma"),
  **_affine("blocks.{i}.norm2", _BLOCK + "LayerNorm_2"),
  **_dense("blocks.{i}.mlp.fc1", _MLP + "Dense_0"),
  **_dense("blocks.{i}.mlp.fc2", _MLP + "Dense_1"),
  **_affine("norm", "Transformer/encoder_norm"),
  **_dense("pre_logits.fc", "pre_logits"),
  **_dense("head", "head"),
}

# Hugging Face's ViTModel, ViTForImageClassification and DeiTModel.
HUGGING_FACE: Table = {
  **_embedding(
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection",
  ),
  **_affine("encoder.layer.{i}.layernorm_before", _BLOCK + "LayerNorm_0"),
  **_attention(
    "encoder.layer.{i}.attention.attention.query",
    "encoder.layer.{i}.attention.attention.key",
    "encoder.layer.{i}.attention.attention.value",
    "encoder.layer.{i}.attention.output.dense",
  ),
  **_affine("encoder.layer.{i}.layernorm_after", _BLOCK + "LayerNorm_2"),
  **_dense("encoder.layer.{i}.intermediate.dense", _MLP + "Dense_0"),
  **_dense("encoder.layer.{i}.output.dense", _MLP + "Dense_1"),
  **_affine("layernorm", "Transformer/encoder_norm"),
  **_dense("classifier", "head"),
}

# Hugging Face's Dinov2Model.
HUGGING_FACE_DINOV2: Table = {
  **_embedding(
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection",
  ),
  **_affine("encoder.layer.{i}.norm1", _BLOCK + "LayerNorm_0"),
  **_attention(
    "encoder.layer.{i}.attention.attention.query",
    "encoder.layer.{i}.attention.attention.key",
    "encoder.layer.{i}.attention.attention.value",
    "encoder.layer.{i}.attention.output.dense",
  ),
  **_layer_scale(
    "encoder.layer.{i}.layer_scale1.lambda1",
    "encoder.layer.{i}.layer_scale2.lambda1",
  ),
  **_affine("encoder.layer.{i}.norm2", _BLOCK + "LayerNorm_2"),
  **_dense("encoder.layer.{i}.mlp.fc1", _MLP + "Dense_0"),
  **_dense("encoder.layer.{i}.mlp.fc2", _MLP + "Dense_1"),
  **_affine("layernorm", "Transformer/encoder_norm"),
}

TABLES = {
  "timm": TIMM,
  "huggingface": HUGGING_FACE,
  "huggingface-dinov2": HUGGING_FACE_DINOV2,
}
# Prefixes of the backbone within larger models and training states.
_PREFIXES = (
  "",
  "module.",
  "backbone.",
  "module.backbone.",
  "vit.",
  "deit.",
  "dinov2.",
  "model.",
)
# Tensors that a plain ViT does not need, and why.
IGNORED = {
  "embeddings.mask_token": "only for masked training",
  "mask_token": "only for masked training",
  "pooler.dense.weight": "not part of the classifier",
  "pooler.dense.bias": "not part of the classifier",
}
DISTILLATION = re.compile(
  r"(dist_token|head_dist\..*|embeddings\.distillation_token"
  r"|distillation_classifier\..*)"
)
_NOT_PLAIN = {
  r".*(reg_token|register_tokens)": "register tokens",
  r".*rel_pos.*": "relative position embeddings",
  r".*mlp\.(w12|w3|weights_in|weights_out|fc1_g|fc1_x)\..*": "a gated MLP",
  r".*(q_norm|k_norm)\..*": "normalized queries and keys",
  r"fc_norm\..*": "a norm after pooling",
  r"norm_pre\..*": "a norm before the blocks",
  r"patch_embed\.backbone\..*": "a convolutional stem (hybrid)",
  r".*patch_embeddings\.backbone\..*": "a convolutional stem (hybrid)",
  r"layers\.\d+\..*": "stages (such as Swin)",
}


def detect(names: Mapping[str, object], path: str) -> tuple[str, str]:
  """Find the family of a checkpoint and the prefix of its names.

  Raises:
    UserError: the names are those of no family.
  """
  for prefix in _PREFIXES:
    if f"{prefix}blocks.0.norm1.weight" in names:
      return "timm", prefix
    if f"{prefix}encoder.layer.0.layernorm_before.weight" in names:
      return "huggingface", prefix
    if f"{prefix}encoder.layer.0.norm1.weight" in names:
      return "huggingface-dinov2", prefix
  examples = ", ".join(sorted(names)[:3])
  raise errors.UserError(
    f"{path}: not a plain ViT of timm, DeiT, DINO or Hugging Face (it has"
    f" {examples}, …); convert it with the library that wrote it"
  )


def check_plain(names: Mapping[str, object], path: str) -> None:
  """Raise UserError if a tensor belongs to a model that is not a plain ViT."""
  for pattern, meaning in _NOT_PLAIN.items():
    for name in sorted(names):
      if re.fullmatch(pattern, name):
        raise errors.UserError(
          f"{path}: has {meaning} ({name}), which these models do not have;"
          " choose a plain ViT"
        )


def split_qkv(arrays: Mapping[str, np.ndarray]) -> Arrays:
  """Split timm's joint tensors of query, key and value."""
  split: Arrays = {}
  for name, x in arrays.items():
    if match := re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name):
      for part, value in zip("qkv", np.split(x, 3), strict=True):
        split[f"{match[1]}{part}.{match[2]}"] = value
    else:
      split[name] = x
  return split


def join_qkv(arrays: Mapping[str, np.ndarray]) -> Arrays:
  """Join query, key and value as timm stores them."""
  joined: Arrays = {}
  for name, x in arrays.items():
    if match := re.fullmatch(r"(blocks\.\d+\.attn\.)q\.(weight|bias)", name):
      parts = [arrays[f"{match[1]}{part}.{match[2]}"] for part in "qkv"]
      joined[f"{match[1]}qkv.{match[2]}"] = np.concatenate(parts)
    elif not re.fullmatch(r"blocks\.\d+\.attn\.[kv]\..*", name):
      joined[name] = x
  return joined


def read(
  arrays: Mapping[str, np.ndarray], table: Table, heads: int, path: str
) -> Arrays:
  """Convert a family's tensors, named without prefix, to Google's names.

  Raises:
    UserError: a tensor is unknown or its shape is wrong.
  """
  converted: Arrays = {}
  for name, x in arrays.items():
    block = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
    index = block[0] if block else ""
    template = name.replace(f".{index}.", ".{i}.", 1) if block else name
    if template not in table:
      raise errors.UserError(
        f"{path}: has {name}, which a plain ViT does not have; remove it or"
        " choose another file"
      )
    ours, layout = table[template]
    try:
      converted[ours.format(i=index)] = np.ascontiguousarray(
        layout.read(x, heads)
      )
    except ValueError as e:
      raise errors.UserError(
        f"{path}: {name} has the shape {list(x.shape)} ({e}); check --heads"
        f" ({heads})"
      ) from e
  return converted


def write(arrays: Mapping[str, np.ndarray], table: Table, heads: int) -> Arrays:
  """Convert arrays with Google's names to a family's tensors.

  Raises:
    UserError: the family has no tensor for an array.
  """
  ours_to_theirs = {
    ours: (name, layout) for name, (ours, layout) in table.items()
  }
  converted: Arrays = {}
  for key, x in arrays.items():
    match = re.search(r"(?<=encoderblock_)\d+", key)
    index = match[0] if match else ""
    template = key.replace(f"_{index}/", "_{i}/", 1) if match else key
    if template not in ours_to_theirs:
      raise errors.UserError(
        f"{key}: a plain ViT of that library has no such parameter; export .npz"
      )
    name, layout = ours_to_theirs[template]
    converted[name.format(i=index)] = np.ascontiguousarray(
      layout.write(x, heads)
    )
  return converted


def check_complete(
  arrays: Mapping[str, np.ndarray], table: Table, path: str
) -> None:
  """Raise UserError if a plain ViT lacks an array; heads are optional."""
  matches = map(re.compile(r".*encoderblock_(\d+)/").match, arrays)
  blocks = sorted({int(match[1]) for match in matches if match})
  optional = re.compile(r"head/.*|pre_logits/.*|.*LayerScale.*")
  for ours, _ in table.values():
    if optional.fullmatch(ours):
      continue
    for i in blocks if "{i}" in ours else [0]:
      if ours.format(i=i) not in arrays:
        raise errors.UserError(
          f"{path}: has nothing for {ours.format(i=i)}; get the whole file, or"
          " choose a model with LN"
        )
  if blocks != list(range(len(blocks))):
    raise errors.UserError(
      f"{path}: lacks a block, it has {blocks}; get the whole file"
    )
