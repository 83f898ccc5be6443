"""Position embeddings of another image size."""

import math

import numpy as np


def resize(pos: np.ndarray, tokens: int) -> np.ndarray:
  """Interpolates a position embedding to another square grid.

  Google's rule: bilinear, corners aligned, no antialiasing; the class token's
  vector is kept. The same as `scipy.ndimage.zoom(order=1)` but for the grids on
  which that leaves the last row and column zero.

  Args:
    pos: [1, 1 + g * g, D], any float type.
    tokens: 1 + n * n.

  Returns:
    [1, 1 + n * n, D] float32.

  Raises:
    ValueError: a grid is not square.
  """
  old, new = _grid(pos.shape[1]), _grid(tokens)
  # Whole numbers, because rounding must not carry the last row past the edge.
  steps = max(new - 1, 1)
  below, rest = np.divmod(np.arange(new) * (old - 1), steps)
  above = np.minimum(below + 1, old - 1)
  share = (rest / steps)[:, None, None]

  def resize_rows(grid):
    # The rows that are needed, before they take twice the memory.
    lower, upper = (grid[i].astype(np.float64) for i in (below, above))
    return (1 - share) * lower + share * upper

  grid = resize_rows(pos[0, 1:].reshape(old, old, -1))
  grid = resize_rows(grid.swapaxes(0, 1)).swapaxes(0, 1)
  grid = grid.reshape(1, new * new, -1)
  return np.concatenate([pos[:, :1], grid], axis=1).astype(np.float32)


def _grid(tokens: int) -> int:
  edge = math.isqrt(max(tokens - 1, 0))
  if edge == 0 or 1 + edge * edge != tokens:
    raise ValueError(f"{tokens} tokens are not a class token and a square grid")
  return edge
