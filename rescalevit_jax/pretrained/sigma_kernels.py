"""Convert layers with sigma_reparam to plain layers and back.

Arrays are by key, see `param_keys`. `models.sigma` explains gamma and
singular_vector.
"""

from collections.abc import Mapping
import math

import numpy as np

from rescalevit_jax.models import sigma
from rescalevit_jax.pretrained import param_keys

_GAMMA = "gamma"
_VECTOR = "singular_vector"


def to_plain(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the arrays of the equivalent plain layers.

  Kernels are multiplied by gamma / sigma(W). Gammas and singular vectors are
  removed, all other arrays are unchanged.

  Raises:
    KeyError: the kernel or singular vector of a gamma is missing.
    ValueError: their shapes do not match.
  """
  arrays = dict(arrays)
  for layer in _layers(arrays):
    kernel, v = arrays[f"{layer}kernel"], arrays.pop(_vector_key(layer))
    gamma = arrays.pop(f"{layer}{_GAMMA}")
    inputs = 2 if layer.endswith("/out/") else 1
    outputs = math.prod(kernel.shape[inputs:])
    if (gamma.shape, v.shape) != ((1,), (outputs,)):
      raise ValueError(
        f"{layer}: {_GAMMA} has shape {gamma.shape}, {_VECTOR} {v.shape}; not"
        f" (1,) and ({outputs},)"
      )
    arrays[f"{layer}kernel"] = kernel * (gamma / sigma.largest(kernel, v))
  return arrays


def from_plain(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return gammas and singular vectors that leave plain kernels unchanged.

  The arrays have the keys and shapes of the result, too. Raises ValueError if a
  kernel is all zeros, so it has no singular vector.
  """
  result = {}
  rng = np.random.default_rng(0)
  for layer in _layers(arrays):
    kernel, key = arrays[f"{layer}kernel"], _vector_key(layer)
    if not kernel.any():
      raise ValueError(f"{layer}kernel is all zeros")
    v = rng.standard_normal(arrays[key].shape, np.float32)
    result[key] = np.asarray(sigma.singular_vector(kernel, v))
    gamma = [sigma.largest(kernel, result[key])]
    result[f"{layer}{_GAMMA}"] = np.array(gamma, np.float32)
  return result


def _layers(arrays):
  """Return the layers' paths, with a trailing slash."""
  suffix = f"/{_GAMMA}"
  return [key.removesuffix(_GAMMA) for key in arrays if key.endswith(suffix)]


def _vector_key(layer):
  return f"{param_keys.STATS}{layer}{_VECTOR}"
