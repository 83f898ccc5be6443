"""Image files of any size and kind, as a model takes them."""

import os

import numpy as np
from PIL import Image
from PIL import ImageOps

from rescalevit_jax import errors

Source = str | os.PathLike[str] | Image.Image | np.ndarray


def read(path: str | os.PathLike[str]) -> Image.Image:
  """Reads an image file as RGB.

  Turned as its EXIF data say; transparent parts are put on white.

  Raises:
    UserError: the file cannot be read as an image.
  """
  try:
    with Image.open(path) as image:
      return _rgb(image)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise errors.UserError(f"{path}: cannot be read as an image ({e})") from e


def model_input(image: Source, size: int) -> np.ndarray:
  """Resizes an image as evaluation does.

  Args:
    image: a path, a Pillow image, or a uint8 array [H, W, 3].
    size: edge S of the result.

  Returns:
    [S, S, 3] float32 in [-1, 1].

  Raises:
    UserError: the file cannot be read as an image.
  """
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  elif not isinstance(image, Image.Image):
    image = read(image)
  # Channel by channel in float32: Pillow would round the RGB image's pixels.
  channels = [
    channel.convert("F").resize((size, size), Image.Resampling.BILINEAR)
    for channel in _rgb(image).split()
  ]
  return np.stack([np.asarray(c) for c in channels], -1) / np.float32(127.5) - 1


def _rgb(image):
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # 16 bits a pixel.
    image = image.convert("F").point(lambda x: x / 257).convert("L")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")
