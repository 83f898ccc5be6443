"""RescaleViT's runs: `original.py:MODEL,NORM` or `…:MODEL,NORM,NPZ`."""

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors


def get_config(run="ViT-B_16,Rescale"):
  """Return the config of a model and a norm, perhaps with initial weights."""
  model_name, comma, rest = run.partition(",")
  norm, _, npz = rest.partition(",")
  if not comma:
    raise errors.UserError(
      f"{run!r}: has no norm; give MODEL,NORM or MODEL,NORM,NPZ"
    )
  config = config_lib.default()
  config.model_name = model_name
  config.model.norm = norm
  if npz:
    config.pretrained_path = npz
  if model_name == "ViT-L_16":
    config.batch = 64
  return config
