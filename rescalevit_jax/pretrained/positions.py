"""Resize position embeddings to another image size."""

import math

from jaxtyping import Float
import numpy as np


def resize(
  pos: Float[np.ndarray, "1 old D"], tokens: int
) -> Float[np.ndarray, "1 new D"]:
  """Interpolate a position embedding to 1 + n * n tokens, in float32.

  Google's rule: bilinear, corners aligned, no antialiasing. The class token's
  vector is unchanged. Equals `scipy.ndimage.zoom(order=1)`, except for grids
  where scipy leaves the last row and column zero. Raises ValueError if a grid
  is not square.
  """
  old, new = _grid(pos.shape[1]), _grid(tokens)
  # In integers: rounding could move the last row past the edge.
  steps = max(new - 1, 1)
  below, rest = np.divmod(np.arange(new) * (old - 1), steps)
  above = np.minimum(below + 1, old - 1)
  weight = (rest / steps)[:, None, None]

  def resize_rows(grid):
    # Select rows before the conversion, which doubles the memory.
    lower, upper = (grid[i].astype(np.float64) for i in (below, above))
    return (1 - weight) * lower + weight * upper

  grid = resize_rows(pos[0, 1:].reshape(old, old, -1))
  grid = resize_rows(grid.swapaxes(0, 1)).swapaxes(0, 1)
  grid = grid.reshape(1, new * new, -1)
  return np.concatenate([pos[:, :1], grid], axis=1).astype(np.float32)


def _grid(tokens: int) -> int:
  edge = math.isqrt(max(tokens - 1, 0))
  if edge == 0 or 1 + edge * edge != tokens:
    raise ValueError(f"{tokens} tokens are not a class token and a square grid")
  return edge
