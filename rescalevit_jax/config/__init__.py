"""The config of a run: defaults, validation, comparison and JSON."""

import json
from typing import Any

from flax import traverse_util
import ml_collections
from ml_collections import config_dict

from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.config import renamed
from rescalevit_jax.models.norms import base


def default() -> ml_collections.ConfigDict:
  """Return the default config: RescaleViT's recipe, ViT-B_16 with LN."""
  values = {
    name: config_dict.placeholder(key.optional)
    if key.default is None
    else key.default
    for name, key in keys.KEYS.items()
  }
  nested = traverse_util.unflatten_dict(values, sep=".")
  return ml_collections.ConfigDict(nested)


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return all values by dotted key, such as {"model.norm": "LN", ...}."""
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def validate(config: ml_collections.ConfigDict) -> None:
  """Raise UserError if a key, its type, its range or a combination is wrong."""
  values = flatten(config)
  for name in values:
    keys.check_key(name)
  for name, key in keys.KEYS.items():
    if name not in values:
      raise errors.UserError(
        f"config: key {name!r} is missing; start from"
        " rescalevit_jax.config.default()"
      )
    if problem := _problem(name, key, values[name]):
      raise errors.UserError(f"config: {name} is {problem}")
  for problem in _conflicts(config):
    raise errors.UserError(f"config: {problem}")


def _problem(name, key, value):
  """Return the problem of a value with its fix; None if it is valid."""
  kind = key.optional or type(key.default)
  if value is not None and type(value) is not kind:
    return f"{value!r}; use a value of type {kind.__name__}"
  if value == "":
    return "empty; give a value"
  if key.accepts(value):
    return None
  if new := renamed.VALUES.get(name, {}).get(value):
    return f"{value!r}, which is now named {new}; use the new name"
  if isinstance(key.valid, str):
    return f"{value!r}; use a value {key.valid}"
  return f"{value!r}; {errors.nearest(str(value), key.valid)}"


def _conflicts(config):
  """Yield the conflicts between keys, each with its fix."""
  values = flatten(config)
  for low, high in (
    ("warmup_steps", "total_steps"),
    ("min_lr", "base_lr"),
    ("fade.begin", "fade.end"),
  ):
    if values[low] > values[high]:
      yield (
        f"{low} ({values[low]}) exceeds {high} ({values[high]}); lower {low}"
      )
  if config.min_lr and config.warmup_steps == config.total_steps:
    yield (
      f"min_lr ({config.min_lr}) has no effect: warmup_steps"
      f" ({config.warmup_steps}) takes all of total_steps"
      f" ({config.total_steps}); lower warmup_steps"
    )
  if config.warmup_steps + (config.decay_steps or 0) > config.total_steps:
    yield (
      f"warmup_steps ({config.warmup_steps}) and decay_steps"
      f" ({config.decay_steps}) exceed total_steps ({config.total_steps});"
      " lower decay_steps"
    )
  alpha_init = f"model.alpha_init ({config.model.alpha_init})"
  if config.model.alpha_init is not None and config.calibration == "all":
    yield f"{alpha_init} overrides calibration (all); set calibration=auto"
  calibrated = base.CALIBRATED in (config.model.alpha_init or "")
  if calibrated and config.calibration == "none":
    yield (
      f"{alpha_init} needs a calibration, but calibration (none) omits it;"
      " set calibration=auto"
    )
  if config.spectral_cap and config.model.sigma_reparam:
    yield (
      f"spectral_cap ({config.spectral_cap}) has no effect with"
      " model.sigma_reparam (True); choose one of them"
    )
  if config.augment.pad_crop and config.augment.crop:
    yield (
      f"augment.pad_crop ({config.augment.pad_crop}) and augment.crop (True)"
      " are both on; choose one of them"
    )
  if config.batch % config.accum_steps:
    yield (
      f"batch ({config.batch}) is not divisible by accum_steps"
      f" ({config.accum_steps}); change one of them"
    )
  if config.batch == config.accum_steps and (config.mixup or config.cutmix):
    yield (
      f"mixup ({config.mixup}) and cutmix ({config.cutmix}) need micro-batches"
      f" of two or more images, but batch ({config.batch}) / accum_steps"
      f" ({config.accum_steps}) is 1; raise batch or lower accum_steps"
    )


def to_json(config: ml_collections.ConfigDict) -> str:
  """Return the text of a run's config.json."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
  """Return the config of a config.json, with renamed keys updated.

  Raises:
    ValueError: the text is damaged.
    KeyError: the text has an unknown key.
  """
  config, values = default(), json.loads(text)
  if not isinstance(values, dict):
    raise ValueError("no JSON object")
  saved = ml_collections.ConfigDict(values)
  config.update_from_flattened_dict(renamed.update(flatten(saved)))
  return config


def differing_keys(
  old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> list[str]:
  """Return the keys in which two runs differ, with both values.

  Keys that do not change a run's numbers are omitted.
  """
  old, new = flatten(old), flatten(new)
  return [
    f"{name} ({old[name]!r} there, {new[name]!r} now)"
    for name, key in keys.KEYS.items()
    if not key.resumable and old[name] != new[name]
  ]
