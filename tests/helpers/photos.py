"""A synthetic image for tests of augmentation."""

import numpy as np
from PIL import Image


def photo(height, width):
  """Return a smooth image with noise and a limited range."""
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(30, 200, (5, 5, 3), np.uint8))
  smooth = np.array(small.resize((width, height)))
  return smooth + rng.integers(-9, 10, smooth.shape).astype(np.uint8)
