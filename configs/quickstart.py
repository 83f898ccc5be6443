"""Handwritten digits, no norm, about a minute on a CPU."""

from rescalevit_jax import config as config_lib


def get_config():
  """Returns the config of this experiment."""
  config = config_lib.default()
  config.dataset = "digits"
  config.model_name = "ViT-XS_2"
  config.model.norm = "Rescale"
  config.image_size = 8
  return config
