"""A small ViT on CIFAR-10 at 32x32 pixels; three epochs on a CPU."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-XS_4"
  config.model.norm = "Rescale"
  config.image_size = 32
  config.batch_eval = 1000
  config.base_lr = 0.1
  config.warmup_steps = 100
  config.total_steps = 1200
  config.eval_every = 300
  config.augment.min_area = 0.3
  config.augment.flip = True
  return config
