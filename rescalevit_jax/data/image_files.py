"""Find and read image files, and resize them for a model."""

import os
import pathlib

from jaxtyping import Float
import numpy as np
from PIL import Image
from PIL import ImageOps

from rescalevit_jax import errors
from rescalevit_jax.data import untrusted_image

Source = str | os.PathLike[str] | Image.Image | np.ndarray


def find(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Return the image files in a folder and its subfolders, sorted.

  Files are recognized by their names. Hidden files and folders are skipped, and
  links to folders are not followed.

  Raises:
    UserError: a folder cannot be listed.
  """
  formats = untrusted_image.supported_formats()
  suffixes = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in formats
  }

  def fail(error):
    raise errors.UserError(
      f"{error.filename}: cannot be listed ({error.strerror}); choose another"
      " folder"
    ) from error

  found = []
  for parent, folders, files in os.walk(folder, onerror=fail):
    folders[:] = [name for name in folders if not name.startswith(".")]
    found += [
      path
      for path in (pathlib.Path(parent, name) for name in files)
      if path.suffix.lower() in suffixes
      and not path.name.startswith(".")
      and path.is_file()
    ]
  return sorted(found)


def read(image: Source) -> Image.Image:
  """Read an image as 8-bit RGB.

  The EXIF orientation is applied. Of an animation the first image is read.
  Transparent parts become white, and 16-bit greys are rounded to 8 bits.

  Args:
    image: a path, a Pillow image, which is not changed, or a uint8 array
      [H, W, 3], [H, W, 1] or [H, W].

  Raises:
    UserError: the image cannot be read, or `untrusted_image` refuses the file.
  """
  if isinstance(image, str | os.PathLike):
    try:
      with untrusted_image.open_image(image) as opened:
        return _rgb(opened)
    except Exception as e:  # Pillow's decoders raise many types.
      raise errors.UserError(
        f"{os.fspath(image)}: cannot be read as an image ({_reason(e, image)});"
        " choose another file"
      ) from e
  if isinstance(image, Image.Image):
    try:
      return _rgb(image.copy())
    except Exception as e:  # Its file may be read only now.
      raise errors.UserError(
        f"a {image.mode} image cannot be converted ({_reason(e)}); convert it"
        " to RGB"
      ) from e
  return _from_array(np.asarray(image))


def model_input(image: Source, size: int) -> Float[np.ndarray, "S S 3"]:
  """Read an image and resize it as evaluation does, to values in [-1, 1].

  Args:
    image: see `read`.
    size: edge S of the result.

  Raises:
    UserError: see `read`.
  """
  rgb = read(image)
  x = np.empty((size, size, 3), np.float32)
  for i in range(3):
    # One float32 channel at a time: Pillow would round the pixels of RGB.
    channel = rgb.getchannel(i).convert("F")
    channel = channel.resize((size, size), Image.Resampling.BILINEAR)
    x[..., i] = np.asarray(channel)
  return x / np.float32(127.5) - 1


def _rgb(image):
  """Convert an image to RGB; the image may be changed."""
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I"):
    image = _eight_bits(image)
  elif image.mode == "F":
    raise ValueError("its pixels are floats; save it with 8 or 16 bits")
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = Image.new("RGB", image.size, "white")
  white.paste(image, mask=image.getchannel("A"))
  return white


def _eight_bits(image):
  """Convert greys of 0 to 65535; Pillow's own conversion would clip them."""
  greys = np.asarray(image)
  if greys.min() < 0 or greys.max() > 65535:
    raise ValueError(
      f"its greys go from {greys.min()} to {greys.max()}; save it with 8 or"
      " 16 bits"
    )
  greys = greys.astype(np.int32)
  greys += 128
  greys //= 257
  return Image.fromarray(greys.astype(np.uint8))


def _from_array(array):
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[..., 0]
  if (
    array.dtype != np.uint8
    or array.ndim not in (2, 3)
    or (array.ndim == 3 and array.shape[2] != 3)
    or not array.size
  ):
    raise errors.UserError(
      f"an image array is {array.dtype} {list(array.shape)}; give uint8"
      " [H, W, 3], or [H, W] for greys"
    )
  return Image.fromarray(array).convert("RGB")


def _reason(error, path=None):
  if isinstance(error, FileNotFoundError):
    return "no such file"
  if isinstance(error, IsADirectoryError):
    return "this is a folder"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if isinstance(error, Image.UnidentifiedImageError):
    empty = path is not None and os.path.getsize(path) == 0
    return "it is empty" if empty else "its format is not supported"
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__
