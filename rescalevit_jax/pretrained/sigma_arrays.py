"""The layers of sigma_reparam among a model's arrays, and plain ones.

Arrays are by key as in an `.npz`: statistics have the prefix `batch_stats/`.
See `models.sigma` for what gamma and singular_vector are.
"""

from collections.abc import Mapping
import math

import numpy as np

from rescalevit_jax.models import sigma
from rescalevit_jax.pretrained import npz

_GAMMA = "gamma"
_VECTOR = "singular_vector"


def plain(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns arrays whose kernels are those that the layers multiply by.

  Without gammas and singular vectors; other arrays are the same.

  Raises:
    KeyError: a gamma's kernel or singular vector is missing.
    ValueError: they do not fit together.
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


def start(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the gammas and singular vectors that leave kernels as they are.

  Args:
    arrays: with the kernels, and of the result's keys the shapes.

  Raises:
    ValueError: a kernel is all zeros, of no singular vector.
  """
  found = {}
  rng = np.random.default_rng(0)
  for layer in _layers(arrays):
    kernel, key = arrays[f"{layer}kernel"], _vector_key(layer)
    if not kernel.any():
      raise ValueError(f"{layer}kernel is all zeros")
    v = rng.standard_normal(arrays[key].shape, np.float32)
    found[key] = np.asarray(sigma.singular_vector(kernel, v))
    found[f"{layer}{_GAMMA}"] = np.float32([sigma.largest(kernel, found[key])])
  return found


def _layers(arrays):
  """Returns what the layers' keys begin with."""
  suffix = f"/{_GAMMA}"
  return [key.removesuffix(_GAMMA) for key in arrays if key.endswith(suffix)]


def _vector_key(layer):
  return f"{npz.STATS}{layer}{_VECTOR}"
