r"""Convert a Vision Transformer of another library to an `.npz` file.

  python -m rescalevit_jax.pretrained.convert model.safetensors \
      --mean=0.5 --std=0.5 --output=vit.npz
  python -m rescalevit_jax.pretrained.convert dino_vitbase16.pth \
      --mean=imagenet --output=dino.npz

Reads .safetensors and .pth files of timm, DeiT, DINO, DINOv2 and Hugging Face
(ViT, DeiT, Dinov2), .onnx files of Dinov2Model and .npz files of big_vision.
The normalization of the inputs is folded into the patch embedding; it is read
from config.json or preprocessor_config.json beside the file, or given. The
output starts a run (--config.pretrained_path) and can be evaluated, plotted and
exported.
"""

from collections.abc import Sequence
import logging
import math
import pathlib
import re
import sys

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import families
from rescalevit_jax.pretrained import fold
from rescalevit_jax.pretrained import input_stats
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import tensor_files
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal

_log = logging.getLogger("rescalevit_jax.pretrained.convert")

_POSITIONS = param_keys.POSITION_EMBEDDING
# Names of GELU in config.json of Hugging Face and timm.
_ERF = ("gelu", "gelu_python")
_TANH = (
  *("gelu_new", "gelu_fast", "gelu_accurate"),
  *("gelu_tanh", "gelu_pytorch_tanh", "gelu_python_tanh"),
)
# Prefixes of heads beside the backbone.
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "head.")


def main(argv: Sequence[str] | None = None) -> int:
  """Convert a file; return the exit code."""
  parser = cli.parser(__doc__)
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("--output", type=pathlib.Path, help="default: FILE.npz")
  parser.add_argument("--heads", type=int, help="attention heads")
  parser.add_argument(
    "--mean",
    help="of the input channels, for pixels in [0, 1]: imagenet, a number or"
    " three",
  )
  parser.add_argument("--std", help="likewise")
  parser.add_argument(
    "--fold_layer_scale",
    action="store_true",
    help="multiply LayerScale into the layers before it, instead of keeping it"
    " (model.residual=layerscale)",
  )
  parser.add_argument(
    "--no_class_position",
    action="store_true",
    help="the class token has no position embedding (timm's no_embed_class)",
  )
  parser.add_argument(
    "--drop_distillation",
    action="store_true",
    help="leave out DeiT's distillation token and head, which changes results",
  )
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _run(args):
  output = args.output or args.file.with_suffix(".npz")
  if output.exists():
    raise errors.UserError(f"{output}: exists already; choose another --output")
  arrays = convert(
    args.file,
    heads=args.heads,
    normalization=input_stats.parse(args.mean, args.std),
    fold_layer_scale=args.fold_layer_scale,
    no_class_position=args.no_class_position,
    drop_distillation=args.drop_distillation,
  )
  npz.save(output, *param_keys.unflatten(arrays))
  print(f"{output}: {sum(x.size for x in arrays.values()):,} weights")
  settings = detect.sizes(arrays) | detect.settings(arrays)
  config = input_stats.json_beside(args.file, "config.json")
  if config.get("global_pool") == "avg":
    settings["pool"] = "gap"  # timm; the arrays are the same.
  if _gelu(args.file, config) == "tanh":
    settings["gelu"] = "tanh"
  print(f"start a run from it with\n  --config.pretrained_path={output}")
  for key, value in settings.items():
    print(f"  --config.model.{key}={value}")
  if settings["patch_size"]:
    grid = math.isqrt(arrays[_POSITIONS].shape[1])
    print(f"  --config.image_size={grid * settings['patch_size']}")


def convert(
  path: pathlib.Path,
  *,
  heads: int | None = None,
  normalization: tuple[Sequence[float], Sequence[float]] | None = None,
  fold_layer_scale: bool = False,
  no_class_position: bool = False,
  drop_distillation: bool = False,
) -> dict[str, np.ndarray]:
  """Read a checkpoint of another library as arrays with Google's names.

  Args:
    path: a .safetensors, .pth, .onnx or .npz file.
    heads: attention heads; None: from the file or config.json, else one for 64
      channels up to a width of 1024.
    normalization: mean and standard deviation of the inputs' channels, for
      pixels in [0, 1]; None: from the files beside it.
    fold_layer_scale: multiply LayerScale into the layers before it.
    no_class_position: the class token has no position embedding.
    drop_distillation: leave out DeiT's distillation token and head.
  """
  if path.suffix == ".npz":
    flags = heads, normalization, fold_layer_scale, no_class_position
    if any((*flags, drop_distillation)):
      raise errors.UserError(
        f"{path}: an .npz of big_vision takes no options but --output; leave"
        " the others out"
      )
    return _from_big_vision(path)
  tensors = tensor_files.read(path)
  family, prefix = families.detect(tensors, str(path))
  tensors = _strip(tensors, prefix)
  families.check_plain(tensors, str(path))
  tensors = _drop(tensors, path, drop_distillation)
  config = input_stats.json_beside(path, "config.json")
  _gelu(path, config)
  norm_name = families.TABLES[family]["Transformer/encoder_norm/scale"]
  norm = tensors.get(norm_name)
  if norm is None or norm.ndim != 1:
    raise errors.UserError(
      f"{path}: has no final norm ({norm_name}); get the whole file"
    )
  if not heads:
    heads = _known_heads(path, config) or _default_heads(len(norm), path)
  arrays = families.read(tensors, family, heads, str(path))
  for key, x in [*arrays.items()]:  # Some models have no biases here.
    if re.search("/(query|key|value)/kernel", key):
      bias = np.zeros(x.shape[1:], np.float32)
      arrays.setdefault(key.replace("kernel", "bias"), bias)
  families.check_complete(arrays, family, str(path))
  arrays[_POSITIONS] = _positions(
    arrays[_POSITIONS],
    path,
    no_class_position=no_class_position,
    drop_distillation=drop_distillation,
  )
  if fold_layer_scale:
    try:
      arrays = fold.layer_scale(arrays)
    except ValueError as e:
      raise errors.UserError(f"{path}: {e}; choose another file") from e
  if arrays["embedding/bias"].shape != arrays["embedding/kernel"].shape[3:]:
    raise errors.UserError(
      f"{path}: the patch embedding's bias and kernel have different widths;"
      " choose another file"
    )
  if arrays["embedding/kernel"].shape[2] != 3:
    raise errors.UserError(
      f"{path}: has {arrays['embedding/kernel'].shape[2]} input channels;"
      " choose a model of RGB images"
    )
  mean, std = normalization or input_stats.find(path, config)
  return fold.input_normalization(
    arrays, np.asarray(mean, np.float64), np.asarray(std, np.float64)
  )


def _strip(tensors, prefix):
  """Return the backbone's tensors, without prefix, and those of a head."""
  return {
    key.removeprefix(prefix): x
    for key, x in tensors.items()
    if key.startswith((prefix, *_HEADS))
  }


def _drop(tensors, path, drop_distillation):
  kept = {}
  found = any(map(families.DISTILLATION.fullmatch, tensors))
  if drop_distillation and not found:
    raise errors.UserError(
      f"{path}: has no distillation token; leave out --drop_distillation"
    )
  for key, x in tensors.items():
    if not x.size or families.IGNORED.fullmatch(key):
      continue
    if families.DISTILLATION.fullmatch(key):
      if not drop_distillation:
        raise errors.UserError(
          f"{path}: has a distillation token ({key}); --drop_distillation"
          " leaves it out, which changes the results"
        )
      continue
    kept[re.sub(r"^cls_classifier\.", "classifier.", key)] = x
  return kept


def _gelu(path, config):
  """Return the kind of GELU: big_vision's, or the one in config.json."""
  if path.suffix == ".npz":
    return "tanh"
  args = _model_args(config)
  name = config.get("hidden_act") or args.get("act_layer") or "gelu"
  if name not in (*_ERF, *_TANH):
    raise errors.UserError(
      f"{path}: has the activation {name}; choose a model with GELU"
    )
  return "tanh" if name in _TANH else "erf"


def _model_args(config):
  """Return the model's arguments in timm's config.json."""
  found = config.get("model_args")
  return found if isinstance(found, dict) else {}


def _known_heads(path, config):
  """Return the number of heads in config.json or in the file, or None."""
  found = [
    config.get("num_attention_heads"),
    _model_args(config).get("num_heads"),
  ]
  if path.suffix == ".safetensors":
    import safetensors

    with safetensors.safe_open(path, framework="numpy") as file:
      text = (file.metadata() or {}).get(families.NUM_HEADS, "")
    found.append(int(text) if text.isdecimal() else None)
  return next((x for x in found if isinstance(x, int) and x > 0), None)


def _default_heads(hidden, path):
  if hidden % 64 or hidden > 1024:  # Wider models have other heads.
    raise errors.UserError(
      f"{path}: the number of attention heads is unknown; give --heads"
    )
  _log.warning(
    "%s: assuming %d heads of 64 channels; give --heads if this is wrong",
    path,
    hidden // 64,
  )
  return hidden // 64


def _positions(
  positions, path, *, no_class_position=False, drop_distillation=False
):
  """Return position embeddings [1, 1 + S * S, D], the class token's first."""
  shape = list(positions.shape)
  if len(shape) != 3 or shape[0] != 1 or shape[1] <= drop_distillation:
    raise errors.UserError(
      f"{path}: its position embeddings have the shape {shape}, not [1, tokens,"
      " width]; choose another file"
    )
  if drop_distillation:
    positions = np.delete(positions, 1, axis=1)
  tokens = positions.shape[1]
  if no_class_position:
    positions = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
  if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
    advice = "choose a square model"
    if math.isqrt(tokens) ** 2 == tokens:
      advice += ", or add --no_class_position if its class token has none"
    raise errors.UserError(
      f"{path}: has {tokens} position embeddings, which are not those of a"
      f" square grid and a class token; {advice}"
    )
  return positions


def _from_big_vision(path):
  """Read big_vision's `.npz`, whose blocks may be stacked in one array."""
  arrays = {}
  for key, x in npz.read(str(path)).arrays.items():
    if key.startswith("MAPHead"):
      raise errors.UserError(
        f"{path}: pools by attention ({key}); choose a model with a class token"
      )
    if match := re.fullmatch(r"Transformer/encoderblock/(.*)", key):
      if not x.ndim:
        raise errors.UserError(
          f"{path}: {key} is a single number; choose another file"
        )
      for i, part in enumerate(x):
        name = f"Transformer/encoderblock_{i}/{match[1]}"
        arrays[param_keys.old_numbering(name)] = part
    else:
      arrays[_POSITIONS if key == "pos_embedding" else key] = x
  for key in ("cls", _POSITIONS):
    if key not in arrays:
      raise errors.UserError(
        f"{path}: has no {key}; choose a model with a class token and learned"
        " positions"
      )
  arrays[_POSITIONS] = _positions(
    arrays[_POSITIONS], path, no_class_position=True
  )
  return arrays


if __name__ == "__main__":
  sys.exit(main())
