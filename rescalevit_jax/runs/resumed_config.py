"""The config file of a run that exists already.

`main` uses `--config=resumed_config.py:WORKDIR` if only --workdir is given.
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
