"""ViT-B_16 with LayerNorm, from Google's ImageNet-21k weights."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-B_16"
  config.model.norm = "LN"
  config.pretrained_path = "ViT-B_16.npz"
  return config
