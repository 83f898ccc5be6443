"""A norm-free ViT on CIFAR, from scratch, with a modern recipe.

21 M parameters, 4x4 patches at 32x32 pixels, 300 epochs.
"""

from rescalevit_jax import config as config_lib


def get_config():
  """Return the config of this experiment."""
  config = config_lib.default()
  config.model_name = "ViT-S_16"
  config.model.patch_size = 4
  config.model.norm = "Cal"
  config.model.residual = "rescalenet"
  config.model.init = "unit"
  config.model.pool = "gap"
  config.model.dropout_rate = 0.0
  config.model.stochastic_depth = 0.1
  config.image_size = 32
  config.batch = 1024
  config.batch_eval = 1000
  config.optimizer = "muon"
  config.base_lr = 2e-3
  config.momentum = 0.95
  config.adam_b2 = 0.99
  config.weight_decay = 0.1
  config.warmup_steps = 500
  config.total_steps = 300 * 50_000 // 1024
  config.eval_every = 500
  config.ema_decay = 0.999
  config.label_smoothing = 0.1
  config.mixup = 0.8
  config.cutmix = 1.0
  config.augment.crop = False
  config.augment.pad_crop = 4
  config.augment.flip = True
  config.augment.auto = "trivial"
  config.augment.random_erasing = 0.25
  return config
