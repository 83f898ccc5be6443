"""Mean and standard deviation with which a model normalizes its inputs."""

from collections.abc import Mapping
import json
import math
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

from rescalevit_jax import errors

# Of the three channels, for pixels in [0, 1].
Stats = tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]

_IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def json_beside(path: pathlib.Path, name: str) -> dict[str, Any]:
  """Return the content of a JSON file; empty if there is none."""
  file = path.with_name(name)
  if not file.exists():
    return {}
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except errors.DAMAGED_JSON:
    found = None
  if not isinstance(found, dict):
    raise errors.UserError(f"{file}: not a JSON object; remove it")
  return found


def parse(mean: str | None, std: str | None) -> Stats | None:
  """Return the values of --mean and --std; None if neither is given."""
  if mean is None and std is None:
    return None
  if "imagenet" in (mean, std):
    if mean != "imagenet" or std not in (None, "imagenet"):
      raise errors.UserError("--mean=imagenet sets both; give it without --std")
    return _IMAGENET[0], _IMAGENET[1]
  if mean is None or std is None:
    raise errors.UserError("--mean and --std: give both, or --mean=imagenet")
  values = []
  for flag, text in (("--mean", mean), ("--std", std)):
    try:
      numbers = [float(x) for x in text.split(",")]
    except ValueError:
      numbers = []
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
      raise errors.UserError(f"{flag} ({text}): not a number or three")
    values.append(numbers * (3 // len(numbers)))
  if min(values[1]) <= 0:
    raise errors.UserError(f"--std ({std}): not positive")
  means, stds = map(np.array, values)
  _check_scale(means, stds, "--mean and --std")
  return means, stds


def find(path: pathlib.Path, config: Mapping[str, Any]) -> Stats:
  """Return mean and deviation from the JSON files beside the weights."""
  timm = config.get("pretrained_cfg")
  timm = timm if isinstance(timm, dict) else {}
  hugging_face = json_beside(path, "preprocessor_config.json")
  if hugging_face.get("do_normalize") is False:
    hugging_face |= {"image_mean": [0] * 3, "image_std": [1] * 3}
  for found, prefix in ((timm, ""), (hugging_face, "image_")):
    values = [found.get(f"{prefix}{name}") for name in ("mean", "std")]
    try:
      mean, std = (np.broadcast_to(np.asarray(x, float), 3) for x in values)
    except (TypeError, ValueError):
      continue
    if np.isfinite([mean, std]).all() and (std > 0).all():
      _check_scale(
        mean, std, f"{path}: mean and std in the JSON file beside it"
      )
      return mean, std
  raise errors.UserError(
    f"{path}: the normalization of its inputs is unknown; give --mean and"
    " --std, such as --mean=0.5 --std=0.5 (ViT, AugReg) or --mean=imagenet"
    " (DeiT, DINO, DINOv2)"
  )


def _check_scale(mean, std, source):
  """Raise a UserError unless mean and deviation fit pixels in [0, 1]."""
  if mean.min() < 0 or max(mean.max(), std.max()) > 1:
    raise errors.UserError(
      f"{source} must be for pixels in [0, 1]; divide values for pixels in"
      " [0, 255] by 255"
    )
