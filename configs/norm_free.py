"""Norms and norm-free methods, RescaleViT's recipe: `norm_free.py:METHOD`.

The model is small enough for a CPU: 12 blocks of width 64 at 32x32 pixels.
`norm_free.py:METHOD,MODEL` selects another, such as
`norm_free.py:Cal,ViT-B_32`. See docs/norm_free.md.
"""

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors

_UNIT = {"model.init": "unit"}
_BOTH = {"model.residual": "rescalenet", "model.init": "unit"}
_CALIBRATED = {"calibration": "all"}
# Multiplier for alphas and branch scales: near 1 / width of the small model,
# and equal for others.
_SLOW = {"lr_mult": "scalars:0.02"}
_POINTWISE = (
  *("DyT", "Derf", "ISRU", "DyISRU", "HardTanh", "Arctan", "Softsign"),
  "Linear",
)

METHODS = {
  "LN": {},
  "BN": {"model.norm": "BN"},
  "GN": {"model.norm": "GN"},
  "LN-google": {"model.init": "google"},
  "LN-unit": _UNIT,
  "LN-rescalenet-unit": _BOTH,
  "LN-rescalenet-unit-slow": {**_BOTH, **_SLOW},
  "LN-post": {"model.norm_position": "post"},
  "LN-peri": {"model.norm_position": "peri"},
  "LN-peri-unit": {"model.norm_position": "peri", **_UNIT},
  "LN-depth-scaling": {"model.norm_depth_scaling": True},
  "Rescale": {"model.norm": "Rescale"},
  "BHyT": {"model.norm": "BHyT"},
  "BHyT-rescalenet-unit-slow": {"model.norm": "BHyT", **_BOTH, **_SLOW},
  "Center": {"model.norm": "Center"},
  "Center-unit": {"model.norm": "Center", **_UNIT},
  "Center-rescalenet-unit-slow": {
    "model.norm": "Center",
    **_BOTH,
    **_SLOW,
  },
  # arXiv:2507.13338, whose optimizer is Muon.
  "Capped": {
    "model.norm": "Identity",
    "model.residual": "convex",
    "optimizer": "muon",
    "spectral_cap": 1.0,
    **_UNIT,
  },
  "Cal": {"model.norm": "Cal"},
  "Cal-unit": {"model.norm": "Cal", **_UNIT},
  "Cal-rescalenet": {"model.norm": "Cal", "model.residual": "rescalenet"},
  "Cal-rescalenet-unit": {"model.norm": "Cal", **_BOTH},
  "Cal-rescalenet-unit-slow": {"model.norm": "Cal", **_BOTH, **_SLOW},
}
for _norm in ("LN", "Cal"):
  METHODS[f"{_norm}-rescalenet-unit-slow-qk"] = {
    **METHODS[f"{_norm}-rescalenet-unit-slow"],
    "model.qk_norm": True,
  }
for _norm in _POINTWISE:
  _own = {"model.norm": _norm}
  METHODS[_norm] = _own
  METHODS[f"{_norm}-rescalenet-unit"] = {**_own, **_CALIBRATED, **_BOTH}
  METHODS[f"{_norm}-rescalenet-unit-slow"] = {
    **METHODS[f"{_norm}-rescalenet-unit"],
    **_SLOW,
  }


def get_config(run="Cal-rescalenet"):
  """Return the config of METHOD, or of METHOD,MODEL at 224x224 pixels."""
  method, _, model_name = run.partition(",")
  if method not in METHODS:
    raise errors.UserError(f"{method!r}: {errors.nearest(method, METHODS)}")
  config = config_lib.default()
  config.update_from_flattened_dict(METHODS[method])
  if model_name:
    config.model_name = model_name
    return config
  config.model_name = "ViT-XS_4"
  config.model.patch_size = 8
  config.model.num_layers = 12
  config.image_size = 32
  config.batch_eval = 1000
  config.warmup_steps = 100
  config.total_steps = 1500
  config.eval_every = 500
  return config
