"""Config keys and values of earlier versions, with their new names."""

from typing import Any

KEYS = {
  "attention_images": "log_attention",
  "augment.erase": "augment.random_erasing",
  "data.held_out": "data.num_val",
  "fade.apart": "fade.separate_cls",
  "fade.width": "fade.site_fraction",
  "scalar_lr": "scalar_lr_mult",
}
VALUES = {
  "model.residual": {"original": "rescalevit", "rescale": "rescalenet"},
}


def update(values: dict[str, Any]) -> dict[str, Any]:
  """Return the flattened config of an earlier version with new names."""
  values = {KEYS.get(name, name): value for name, value in values.items()}
  for name, new in VALUES.items():
    if name in values:
      values[name] = new.get(values[name], values[name])
  return values
