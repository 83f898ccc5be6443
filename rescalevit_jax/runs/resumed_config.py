"""The config of a run that is there already, as a config file.

`--config=resumed_config.py:WORKDIR`; what `main` takes where --config is not given.
"""

import pathlib

from rescalevit_jax import errors
from rescalevit_jax.runs import folder


def get_config(workdir):
  """Returns the config of the run in a folder."""
  config = folder.read_config(pathlib.Path(workdir))
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there to go on with; give --config to begin one"
    )
  return config
