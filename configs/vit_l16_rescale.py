"""RescaleViT's recipe: ViT-L_16 without normalization, from scratch."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-L_16"
  config.model.norm = "Rescale"
  config.batch = 64
  return config
