"""Load trained models from `.npz` files in Google's format."""

import logging
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import imagenet_names
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import load as load_lib
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys

_log = logging.getLogger(__name__)

# Words of FILE:ARGS for arguments of `load`.
_WORDS: dict[str, tuple[str, Any]] = {
  **{name: ("norm", name) for name in norms.NORMS},
  **{name: ("gelu", name) for name in vit_config.GELUS},
  **{name: ("pool", name) for name in vit_config.POOLS},
  "convex": ("residual", "convex"),
  "depth_scaling": ("norm_depth_scaling", True),
}
_NUMBERS: dict[str, tuple[str, type]] = {
  "c": ("residual_c", float),
  "eps": ("norm_epsilon", float),
  "groups": ("gn_groups", int),
  "logit_cap": ("logit_cap", float),
}


def parse(reference: str) -> tuple[str, dict[str, Any]]:
  """Parse FILE[:ARGS] into the file and keyword arguments of `load`."""
  path, colon, words = reference.rpartition(":")
  whole = words.endswith(".npz") or pathlib.Path(reference).is_file()
  if not colon or whole:
    return reference, {}
  options: dict[str, Any] = {}
  for word in filter(None, words.split(",")):
    name, equals, text = word.partition("=")
    if equals and name in _NUMBERS:
      key, parse = _NUMBERS[name]
      value = _positive(text, parse)
    else:
      key, value = _WORDS.get(word, ("", None))
    if value is None or key in options:
      raise errors.UserError(
        f"--npz: unknown or too many: {word!r} in {reference}; at most one"
        " norm, one GELU, one pool, convex, depth_scaling, and numbers above 0"
        " as in c=NUMBER, eps=NUMBER, groups=NUMBER, logit_cap=NUMBER;"
        f" {errors.nearest(word, _WORDS)}"
      )
    options[key] = value
  return path, options


def _positive(text, parse):
  """Return a finite number above 0, or None if the text is not one."""
  try:
    return number if 0 < (number := parse(text)) < math.inf else None
  except ValueError:
    return None


def load(
  path: str | os.PathLike[str], norm: str | None = None, **options: Any
) -> trained_model.TrainedModel:
  """Load a checkpoint file; the shapes of its arrays determine the model.

  Classes have ImageNet's names if there are as many, otherwise their indices.

  Args:
    path: an `.npz` in Google's format.
    norm: norm of the model; None to infer it from the names of the arrays.
      GN cannot be told from LN: pass 'GN'.
    **options: other fields of `ViTConfig` that the arrays do not show: `gelu`
      ('tanh' for Google's files), `pool`, `residual_c`, `norm_epsilon`,
      `gn_groups`, `logit_cap`, `norm_depth_scaling`, `residual` (convex).

  Raises:
    UserError: the file cannot be read, holds no complete ViT, or holds a ViT
      with another norm.
  """
  path = pathlib.Path(path)
  arrays = npz.read(os.fspath(path)).arrays
  sizes = detect.sizes(arrays)
  positions = arrays.get(param_keys.POSITION_EMBEDDING)
  patch_size = sizes["patch_size"]
  if (
    patch_size is None
    or None in sizes.values()
    or positions is None
    or positions.ndim != 3
  ):
    raise errors.UserError(
      f"{path}: does not hold a complete Vision Transformer"
    )
  found = detect.settings(arrays)
  possible = detect.same_arrays(found["norm"])
  if norm is None and len(possible) > 1:
    _log.info(
      "%s: assuming %s; append the norm if it is %s",
      path,
      possible[0],
      " or ".join(f":{other}" for other in possible[1:]),
    )
  norm = norm or possible[0]
  if "residual_c" in options and found["residual"] != "rescalenet":
    raise errors.UserError(
      f"{path}: has no residual with a constant c; leave c out"
    )
  if "gn_groups" in options and norm != "GN":
    raise errors.UserError(
      f"{path}: groups are of GN; add GN, or leave them out"
    )
  image_size = math.isqrt(positions.shape[1]) * patch_size
  num_classes = np.size(arrays.get("head/bias", ()))
  try:
    model = models.create(
      next(iter(vit_config.VARIANTS)),
      num_classes=num_classes or 1,
      image_size=image_size,
      dtype="auto",
      **found | {"norm": norm} | options,
      **sizes,
    )
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  if norm not in possible:
    raise errors.UserError(
      f"{path}: holds a model with {found['norm']}, not {norm}; change the norm"
    )
  like = trained_model.shapes(model, image_size)
  params, batch_stats, report = load_lib.load(
    path, like["params"], like.get("batch_stats", {})
  )
  if report.initial:
    raise errors.UserError(
      f"{path}: lacks {report.initial[0]}; use a complete checkpoint"
    )
  if report.unsupported:
    raise errors.UserError(
      f"{path}: the model has no array {report.unsupported[0]}; leave out"
      f" {model.config.residual}"
    )
  return trained_model.TrainedModel(
    path.stem,
    model,
    jax.device_put({"params": params, "batch_stats": batch_stats}),
    image_size,
    imagenet_names.find(num_classes) or tuple(map(str, range(num_classes))),
  )
