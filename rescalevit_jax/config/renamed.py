"""Config keys and values of earlier versions, with their new names."""

from collections.abc import Callable
from typing import Any

KEYS = {
  "attention_images": "log_attention",
  "augment.erase": "augment.random_erasing",
  "data.held_out": "data.num_val",
  "fade.apart": "fade.separate_cls",
  "fade.width": "fade.site_fraction",
  "scalar_lr": "lr_mult",
  "scalar_lr_mult": "lr_mult",
}
VALUES = {
  "model.residual": {"original": "rescalevit", "rescale": "rescalenet"},
}


def _scalars(factor: float) -> str | None:
  return None if factor == 1 else f"scalars:{factor}"


# The new form of a value whose key has changed its type.
CONVERT: dict[str, Callable[[Any], Any]] = {
  "scalar_lr": _scalars,
  "scalar_lr_mult": _scalars,
}


def hint(name: str) -> str:
  """Return the end of the error message for a key of an earlier version."""
  new = KEYS[name]
  if name in CONVERT:
    return f"is now a part of {new}; use {new}={CONVERT[name](0.1)}"
  return f"is now named {new}; use the new name"


def update(values: dict[str, Any]) -> dict[str, Any]:
  """Return the flattened config of an earlier version with new names."""
  values = {
    KEYS.get(name, name): CONVERT.get(name, lambda x: x)(value)
    for name, value in values.items()
  }
  for name, new in VALUES.items():
    if name in values:
      values[name] = new.get(values[name], values[name])
  return values
