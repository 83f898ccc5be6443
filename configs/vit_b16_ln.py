"""RescaleViT's recipe: ViT-B_16 with LayerNorm, from scratch."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-B_16"
  config.model.norm = "LN"
  return config
