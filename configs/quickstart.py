"""A small norm-free ViT on handwritten digits; one minute on a CPU."""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.dataset = "digits"
  config.image_size = 8
  config.model_name = "ViT-XS_2"
  config.model.norm = "Rescale"
  config.base_lr = 0.3
  config.warmup_steps = 100
  config.total_steps = 2000
  config.batch = 64
  config.batch_eval = 360
  config.eval_every = 200
  config.augment.min_area = 0.6
  return config
