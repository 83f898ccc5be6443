"""RescaleViT's recipe: ViT-B_32 without normalization, from scratch."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-B_32"
  config.model.norm = "Rescale"
  return config
