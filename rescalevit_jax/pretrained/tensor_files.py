"""Read the tensors of checkpoint files of other libraries."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.pretrained import onnx_weights

# Parts of a training checkpoint with weights, in order of preference.
_WEIGHTS = ("model_ema", "teacher", "state_dict", "model")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the float32 tensors of a .safetensors, .onnx or .pth file, by name.

  Pickled code in a .pth file is not executed.
  """
  if path.exists() and not path.is_file():  # Reading a pipe can block.
    raise errors.UserError(f"{path}: not a file; give a checkpoint file")
  try:
    if path.suffix == ".safetensors":
      from safetensors import numpy as safetensors

      tensors: Mapping[str, Any] = safetensors.load_file(path)
    elif path.suffix == ".onnx":
      tensors = onnx_weights.read(path)
    else:
      import torch

      found = torch.load(path, map_location="cpu", weights_only=True)
      parts = (found.get(name) for name in _WEIGHTS)
      found = next((x for x in parts if isinstance(x, dict)), found)
      tensors = {
        key: x.float().numpy()
        for key, x in found.items()
        if isinstance(x, torch.Tensor)
      }
  except errors.UserError:
    raise
  except ImportError as e:
    raise errors.UserError(
      f"{path}: needs {e.name}; pip install 'rescalevit-jax[convert]'"
    ) from e
  except Exception as e:  # Damaged files raise errors of many kinds.
    raise errors.UserError(
      f"{path}: cannot be read ({errors.brief(e)}); get the file again"
    ) from e
  return {key: np.asarray(x, np.float32) for key, x in tensors.items()}
