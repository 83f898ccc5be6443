"""LN against no norm, on a ViT that a CPU trains: `norm_free.py:METHOD`.

RescaleViT's recipe, with 12 blocks of width 64 on images of 32x32 pixels; see
docs/norm_free.md.
"""

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors

METHODS = {
  "LN": {},
  "LN-unit": {"init": "unit"},
  "LN-rescale": {"residual": "rescale"},
  "Rescale": {"norm": "Rescale"},
  "DyT": {"norm": "DyT"},
  "Derf": {"norm": "Derf"},
  "Cal": {"norm": "Cal"},
  "Cal-rescale": {"norm": "Cal", "residual": "rescale"},
}


def get_config(method="Cal-rescale"):
  """Returns the config of one method."""
  if method not in METHODS:
    raise errors.UserError(f"{method!r}: {errors.nearest(method, METHODS)}")
  config = config_lib.default()
  config.model_name = "ViT-XS_4"
  config.model.patch_size = 8
  config.model.num_layers = 12
  config.model.update(METHODS[method])
  config.image_size = 32
  config.batch_eval = 1000
  config.warmup_steps = 100
  config.total_steps = 1500
  config.eval_every = 500
  return config
