"""Names and layouts of Vision Transformers in other libraries.

A family is a table from the names of Google's `.npz` files to its own. The
layout of a tensor follows from Google's name. The same table is used to read
and to write.
"""

from collections.abc import Mapping
import re

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import param_keys

Arrays = dict[str, np.ndarray]

_BLOCK = "Transformer/encoderblock_{i}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_MLP = _BLOCK + "MlpBlock_3/"
_NORM_1, _NORM_2 = _BLOCK + "LayerNorm_0", _BLOCK + "LayerNorm_2"
_LAST_NORM = "Transformer/encoder_norm"
_SCALE_1 = _BLOCK + "LayerScale_0/scale"
_SCALE_2 = _BLOCK + "LayerScale_2/scale"
_ARRAYS = ("cls", param_keys.POSITION_EMBEDDING, _SCALE_1, _SCALE_2)


def _table(names: dict[str, str]) -> dict[str, str]:
  """Return a table from our array names to the family's tensor names."""
  table = {}
  for ours, theirs in names.items():
    if ours in _ARRAYS:
      table[ours] = theirs
    else:
      is_norm = ours in (_NORM_1, _NORM_2, _LAST_NORM)
      weight = "scale" if is_norm else "kernel"
      table[f"{ours}/{weight}"] = f"{theirs}.weight"
      table[f"{ours}/bias"] = f"{theirs}.bias"
  return table


_HUGGING_FACE = {
  "cls": "embeddings.cls_token",
  param_keys.POSITION_EMBEDDING: "embeddings.position_embeddings",
  "embedding": "embeddings.patch_embeddings.projection",
  _ATTENTION + "query": "encoder.layer.{i}.attention.attention.query",
  _ATTENTION + "key": "encoder.layer.{i}.attention.attention.key",
  _ATTENTION + "value": "encoder.layer.{i}.attention.attention.value",
  _ATTENTION + "out": "encoder.layer.{i}.attention.output.dense",
  _LAST_NORM: "layernorm",
}
TABLES = {
  # timm, DeiT, DINO and DINOv2 (facebookresearch).
  "timm": _table(
    {
      "cls": "cls_token",
      param_keys.POSITION_EMBEDDING: "pos_embed",
      "embedding": "patch_embed.proj",
      _NORM_1: "blocks.{i}.norm1",
      # Query, key and value are stored as one tensor: see `_split_qkv`.
      _ATTENTION + "query": "blocks.{i}.attn.q",
      _ATTENTION + "key": "blocks.{i}.attn.k",
      _ATTENTION + "value": "blocks.{i}.attn.v",
      _ATTENTION + "out": "blocks.{i}.attn.proj",
      _SCALE_1: "blocks.{i}.ls1.gamma",
      _NORM_2: "blocks.{i}.norm2",
      _MLP + "Dense_0": "blocks.{i}.mlp.fc1",
      _MLP + "Dense_1": "blocks.{i}.mlp.fc2",
      _SCALE_2: "blocks.{i}.ls2.gamma",
      _LAST_NORM: "norm",
      "pre_logits": "pre_logits.fc",
      "head": "head",
    }
  ),
  # ViTModel, ViTForImageClassification and DeiTModel.
  "huggingface": _table(
    {
      **_HUGGING_FACE,
      _NORM_1: "encoder.layer.{i}.layernorm_before",
      _NORM_2: "encoder.layer.{i}.layernorm_after",
      _MLP + "Dense_0": "encoder.layer.{i}.intermediate.dense",
      _MLP + "Dense_1": "encoder.layer.{i}.output.dense",
      "head": "classifier",
    }
  ),
  # Dinov2Model.
  "huggingface-dinov2": _table(
    {
      **_HUGGING_FACE,
      _NORM_1: "encoder.layer.{i}.norm1",
      _SCALE_1: "encoder.layer.{i}.layer_scale1.lambda1",
      _NORM_2: "encoder.layer.{i}.norm2",
      _MLP + "Dense_0": "encoder.layer.{i}.mlp.fc1",
      _MLP + "Dense_1": "encoder.layer.{i}.mlp.fc2",
      _SCALE_2: "encoder.layer.{i}.layer_scale2.lambda1",
    }
  ),
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
# Metadata of a .safetensors file that this package writes.
NUM_HEADS = "num_heads"
# Tensors that the classifier does not use: mask tokens, Hugging Face's pooler,
# and the training heads of DINO and DINOv2.
IGNORED = re.compile(
  r"(embeddings\.)?mask_token|pooler\.dense\.(weight|bias)"
  r"|(head\.(mlp|last_layer)|dino_head|ibot).*"
)
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
  r"(patch_embed|.*patch_embeddings)\.backbone\..*": (
    "a convolutional stem (hybrid)"
  ),
  r"layers\.\d+\..*": "stages (such as Swin)",
}


def detect(names: Mapping[str, object], path: str) -> tuple[str, str]:
  """Find the family of a checkpoint and the prefix of its names."""
  for prefix in _PREFIXES:
    for family, table in TABLES.items():
      if prefix + table[f"{_NORM_1}/scale"].format(i=0) in names:
        return family, prefix
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


def read(
  tensors: Mapping[str, np.ndarray], family: str, heads: int, path: str
) -> Arrays:
  """Convert a family's tensors, named without prefix, to Google's names."""
  keys = {theirs: ours for ours, theirs in TABLES[family].items()}
  converted: Arrays = {}
  for name, x in _split_qkv(tensors, path).items():
    block = re.search(r"\.(\d+)\.", name)
    template = name.replace(block[0], ".{i}.", 1) if block else name
    if template not in keys:
      raise errors.UserError(
        f"{path}: has {name}, which a plain ViT does not have; remove it or"
        " choose another file"
      )
    key = keys[template].format(i=block and block[1])
    try:
      converted[key] = np.ascontiguousarray(_to_flax(key, x, heads))
    except ValueError as e:
      attention = "MultiHeadDotProductAttention" in key
      advice = (
        f"check --heads ({heads})" if attention else "choose another file"
      )
      raise errors.UserError(
        f"{path}: {name} has the shape {list(x.shape)} ({e}); {advice}"
      ) from e
  return converted


def write(arrays: Mapping[str, np.ndarray], family: str) -> Arrays:
  """Convert arrays with Google's names to a family's tensors."""
  converted: Arrays = {}
  for key, x in arrays.items():
    block = re.search(r"encoderblock_(\d+)", key)
    template = key.replace(block[0], "encoderblock_{i}") if block else key
    if template not in TABLES[family]:
      raise errors.UserError(
        f"{key}: a plain ViT of that library has no such parameter; export .npz"
      )
    name = TABLES[family][template].format(i=block and block[1])
    converted[name] = np.ascontiguousarray(_to_torch(key, x))
  return _join_qkv(converted)


def check_complete(
  arrays: Mapping[str, np.ndarray], family: str, path: str
) -> None:
  """Raise UserError if a plain ViT lacks an array; heads are optional."""
  matches = filter(None, map(param_keys.BLOCK.fullmatch, arrays))
  blocks = 1 + max((int(match[2]) for match in matches), default=-1)
  optional = re.compile(r"head/.*|pre_logits/.*|.*LayerScale.*")
  for template in TABLES[family]:
    if optional.fullmatch(template):
      continue
    for i in range(blocks) if "{i}" in template else [0]:
      if template.format(i=i) not in arrays:
        raise errors.UserError(
          f"{path}: lacks {template.format(i=i)}; get the whole file,"
          " or choose a model with LN"
        )


def _to_flax(key, x, heads):
  """Convert a tensor of torch to the array of flax with this key."""
  patches, kernel = key == "embedding/kernel", key.endswith("/kernel")
  if key not in _ARRAYS and x.ndim != (4 if patches else 2 if kernel else 1):
    raise ValueError(f"{x.ndim} axes")
  if patches:
    return x.transpose(2, 3, 1, 0)
  if re.search("/(query|key|value)/", key):
    return x.T.reshape(*x.shape[1:], heads, -1)
  if key.endswith("/out/kernel"):
    return x.T.reshape(heads, -1, x.shape[0])
  return x.T if kernel else x


def _to_torch(key, x):
  """Return the inverse of `_to_flax`."""
  if key == "embedding/kernel":
    return x.transpose(3, 2, 0, 1)
  if re.search("/(query|key|value)/", key):
    return x.reshape(*x.shape[:-2], -1).T
  if key.endswith("/out/kernel"):
    return x.reshape(-1, x.shape[-1]).T
  return x.T if key.endswith("/kernel") else x


def _split_qkv(tensors, path):
  """Split timm's joint tensors of query, key and value."""
  split = {}
  for name, x in tensors.items():
    if match := re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name):
      if not x.ndim or len(x) % 3:
        raise errors.UserError(
          f"{path}: {name} has the shape {list(x.shape)}, which is not"
          " divisible by 3; get the whole file"
        )
      for part, value in zip("qkv", np.split(x, 3), strict=True):
        split[f"{match[1]}{part}.{match[2]}"] = value
    else:
      split[name] = x
  return split


def _join_qkv(tensors):
  """Join query, key and value as timm stores them."""
  joined = {}
  for name, x in tensors.items():
    if match := re.fullmatch(r"(blocks\.\d+\.attn\.)q\.(weight|bias)", name):
      parts = [tensors[f"{match[1]}{part}.{match[2]}"] for part in "qkv"]
      joined[f"{match[1]}qkv.{match[2]}"] = np.concatenate(parts)
    elif not re.fullmatch(r"blocks\.\d+\.attn\.[kv]\..*", name):
      joined[name] = x
  return joined
