"""Remove the norms of an LN model by fine-tuning: `remove_norm.py:METHOD`.

    --config=configs/remove_norm.py:Fade --config.pretrained_path=FILE.npz

The method LN keeps the norms, for comparison. The default model is the
small one of `norm_free.py`; `remove_norm.py:METHOD,MODEL` fine-tunes Google's
MODEL at 224 pixels with the default recipe. See docs/results/remove_norm.
"""

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors

METHODS = {
  "LN": {"model.norm": "LN"},
  "Fade": {"model.norm": "Fade"},
  "Fade-DyT": {"model.norm": "Fade", "fade.alpha": 0.5},
  # Foldable: one scale for class token and patches.
  "Fade-one": {"model.norm": "Fade", "fade.separate_cls": False},
  # Ablations.
  "Fade-together": {"model.norm": "Fade", "fade.site_fraction": 1.0},
  "Fade-abrupt": {"model.norm": "Fade", "fade.end": 0.1},
  # Others' methods, and no transition at all.
  "TaperLN": {"model.norm": "TaperLN"},
  "TaperLN-internal": {"model.norm": "TaperLN", "taper.final": False},
  "PRepBN": {"model.norm": "PRepBN"},
  "Cal": {"model.norm": "Cal"},
  "DyT": {"model.norm": "DyT", "model.alpha_init": "calibrated"},
}


def get_config(run="Fade"):
  """Return the config of a method, for the small model or another."""
  method, _, model_name = run.partition(",")
  if method not in METHODS:
    raise errors.UserError(f"{method!r}: {errors.nearest(method, METHODS)}")
  config = config_lib.default()
  config.update_from_flattened_dict(METHODS[method])
  config.pretrained_path = f"{model_name or 'LN'}.npz"
  # Evaluate at the end only: an earlier model may still have norms.
  config.eval_every = 1_000_000
  if model_name:
    config.model_name = model_name
    config.model.gelu = "tanh"
    return config
  config.model_name = "ViT-XS_4"
  config.model.patch_size = 8
  config.model.num_layers = 12
  config.image_size = 32
  config.batch_eval = 1000
  config.model.dropout_rate = 0.0
  config.optimizer = "adamw"
  config.base_lr = 1e-3
  config.weight_decay = 0.05
  config.warmup_steps = 50
  config.total_steps = 1500
  config.augment.min_area = 0.3
  config.augment.flip = True
  return config
