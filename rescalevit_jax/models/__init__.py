"""Vision Transformers by name: `create("ViT-B_16", num_classes=10)`."""

import dataclasses
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.models import vit
from rescalevit_jax.models import vit_config


def create(name: str, **settings: Any) -> vit.VisionTransformer:
  """Return a Vision Transformer as a flax.linen module.

  The name is a key of `vit_config.VARIANTS`. Keyword arguments are fields of
  `vit_config.ViTConfig`; `num_classes` is required. A size overrides the
  variant's size unless it is None.
  """
  variants = vit_config.VARIANTS
  if name not in variants:
    raise errors.UserError(
      f"model_name: unknown {name!r}; {errors.nearest(name, variants)}"
    )
  fields = [field.name for field in dataclasses.fields(vit_config.ViTConfig)]
  for key in settings:
    if key not in fields:
      raise errors.UserError(
        f"models.create: unknown argument {key!r};"
        f" {errors.nearest(key, fields)}"
      )
  sizes = variants[name] | {
    key: value
    for key, value in settings.items()
    if key in vit_config.SIZES and value is not None
  }
  config = vit_config.ViTConfig(**(settings | sizes))
  return vit.VisionTransformer(config.resolve())
