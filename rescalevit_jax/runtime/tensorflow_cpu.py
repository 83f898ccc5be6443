"""Import of TensorFlow, which is slow and would reserve GPUs."""

import functools
import os
import types

from rescalevit_jax import errors

# Level 3 hides all but fatal messages; oneDNN would log one when enabled.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


@functools.cache
def load() -> types.ModuleType:
  """Import and return TensorFlow, without log messages and without GPUs.

  Raises:
    UserError: it is not installed or cannot be imported.
  """
  before = {name: os.environ.get(name) for name in _QUIET}
  os.environ.update(_QUIET)
  try:
    import tensorflow as tf
  except ImportError as e:
    raise errors.UserError(
      f"cannot import TensorFlow ({' '.join(str(e).split())}); run pip install"
      " tensorflow-cpu"
    ) from e
  finally:  # JAX and child processes read these variables too.
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
  tf.config.set_visible_devices([], "GPU")
  return tf
