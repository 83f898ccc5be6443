"""The config of a run: made, checked, compared, to and from JSON."""

from collections.abc import Iterator
import json
from typing import Any

import ml_collections
from ml_collections import config_dict

from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.config import renamed


def default() -> ml_collections.ConfigDict:
  """Returns the default config: RescaleViT's recipe, ViT-B_16 with LN."""
  config = ml_collections.ConfigDict()
  for name, key in keys.KEYS.items():
    *path, leaf = name.split(".")
    node = config
    for part in path:
      if part not in node:
        node[part] = ml_collections.ConfigDict()
      node = node[part]
    node[leaf] = key.default
    if key.default is None:
      node[leaf] = config_dict.placeholder(key.optional)
  return config


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns {'model.norm': 'LN', …}: every key with its dotted name."""

  def items(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
      if isinstance(value, ml_collections.ConfigDict):
        yield from items(value, f"{prefix}{name}.")
      else:
        yield prefix + name, value

  return dict(items(config, ""))


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks names, types and ranges of all keys.

  Raises:
    UserError: naming the key, its value and the valid ones.
  """
  values = flatten(config)
  for name in values:
    keys.check_key(name)
  for name, key in keys.KEYS.items():
    if name not in values:
      raise errors.UserError(
        f"config: key {name!r} is missing; start from"
        " rescalevit_jax.config.default()"
      )
    value = values[name]
    kind = key.optional or type(key.default)
    if value is not None and type(value) is not kind:
      raise errors.UserError(
        f"config: {name} is {value!r}, but must be of type {kind.__name__}"
      )
    if value == "":
      raise errors.UserError(f"config: {name} is empty")
    if key.accepts(value):
      continue
    if new := renamed.VALUES.get(name, {}).get(value):
      raise errors.UserError(
        f"config: {name}={value} is now named {new}; use the new name"
      )
    if isinstance(key.valid, str):
      raise errors.UserError(
        f"config: {name} is {value!r}, but must be {key.valid}"
      )
    raise errors.UserError(
      f"config: {name} is {value!r}; {errors.nearest(str(value), key.valid)}"
    )
  if config.warmup_steps > config.total_steps:
    raise errors.UserError(
      f"config: warmup_steps is {config.warmup_steps}, more than total_steps,"
      f" {config.total_steps}"
    )
  if config.fade.begin > config.fade.end:
    raise errors.UserError(
      f"config: fade.begin is {config.fade.begin}, more than fade.end,"
      f" {config.fade.end}"
    )
  if config.augment.pad_crop and config.augment.crop:
    raise errors.UserError(
      f"config: augment.pad_crop is {config.augment.pad_crop}, but augment.crop"
      " is on; choose one of the two"
    )
  if config.batch % config.accum_steps:
    raise errors.UserError(
      f"config: batch is {config.batch}, not divisible by accum_steps,"
      f" {config.accum_steps}"
    )
  if config.batch == config.accum_steps and (config.mixup or config.cutmix):
    raise errors.UserError(
      "config: mixup and cutmix need two images or more in a micro-batch, which"
      f" has batch / accum_steps = 1; reduce accum_steps, {config.accum_steps}"
    )


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the text of a run's config.json."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
  """Reads config.json back; raises ValueError or KeyError if it is damaged."""
  config = default()
  saved = ml_collections.ConfigDict(json.loads(text))
  config.update_from_flattened_dict(renamed.update(flatten(saved)))
  return config


def differing_keys(
  old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> list[str]:
  """Names the keys in which two runs differ, with both values.

  Keys that do not change a run's numbers are left out.
  """
  old, new = flatten(old), flatten(new)
  return [
    f"{name} ({old[name]!r} there, {new[name]!r} now)"
    for name, key in keys.KEYS.items()
    if not key.resumable and old[name] != new[name]
  ]
