"""Image files, of any size that memory has room for, as a model takes them."""

import io
import mmap
import os
import pathlib
import re

import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import TiffImagePlugin

from rescalevit_jax import errors

# An image takes up to 14 bytes a pixel while it is read: 1.1 GB at this size.
# A file of AVIF or WebP is in memory, too; 16 bits of 4 channels are 0.64 GB.
MAX_PIXELS = 80_000_000
MAX_BYTES = 1_000_000_000
# Each goes through all pixels of a JPEG file, however little it says: 10 s at
# this number. What other programs write has about ten.
_MAX_SCANS = 2000

# Only these: of others, Pillow reads the header alone, calls other programs
# (EPS is one for Ghostscript), or can be made to take any time or memory.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Source = str | os.PathLike[str] | Image.Image | np.ndarray


def find(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Finds the files in a folder and below it that by their names are images.

  Hidden files and folders are left out, links to folders are not followed.

  Returns:
    The paths, sorted.

  Raises:
    UserError: a folder cannot be listed.
  """
  formats = _formats()
  suffixes = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in formats
  }

  def fail(error):
    raise errors.UserError(
      f"{error.filename}: cannot be listed ({error.strerror})"
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
  """Reads an image as 8-bit RGB.

  Turned as its EXIF data say, the first one of an animation, transparent parts
  on white; 16-bit greys are rounded to 8 bits.

  Args:
    image: a path, a Pillow image, which is not changed, or a uint8 array
      [H, W, 3], [H, W, 1] or [H, W].

  Raises:
    UserError: it cannot be read as an image, or a file is of none of `FORMATS`
      or has more than `MAX_PIXELS` pixels or `MAX_BYTES`.
  """
  if isinstance(image, str | os.PathLike):
    try:
      with (
        _File(io.FileIO(image)) as file,
        Image.open(file, formats=_formats()) as opened,
      ):
        _check_size(opened)
        if opened.format in ("JPEG", "MPO"):
          _check_scans(file)
        return _rgb(opened)
    except Exception as e:  # Pillow's decoders raise all sorts.
      raise errors.UserError(
        f"{os.fspath(image)}: cannot be read as an image ({_reason(e, image)})"
      ) from e
  if isinstance(image, Image.Image):
    try:
      return _rgb(image.copy())
    except Exception as e:  # It may be of a file that is read only now.
      raise errors.UserError(
        f"a {image.mode} image cannot be converted ({_reason(e)})"
      ) from e
  return _from_array(np.asarray(image))


def model_input(image: Source, size: int) -> np.ndarray:
  """Resizes an image as evaluation does.

  Args:
    image: as `read` takes it.
    size: edge S of the result.

  Returns:
    [S, S, 3] float32 in [-1, 1].

  Raises:
    UserError: it cannot be read as an image.
  """
  image = read(image)
  x = np.empty((size, size, 3), np.float32)
  for i in range(3):
    # A channel in float32: Pillow would round the RGB image's pixels.
    channel = image.getchannel(i).convert("F")
    x[..., i] = channel.resize((size, size), Image.Resampling.BILINEAR)
  return x / np.float32(127.5) - 1


class _File(io.BufferedReader):
  """A file of which no more is read than it has, and that a few times only.

  Pillow asks for as many bytes as a file says, and Python allocates them first.
  Time is then linear in the file's size: 1 s a MB at worst, for a damaged GIF.
  """

  def __init__(self, raw: io.FileIO):
    super().__init__(raw)
    self._size = os.fstat(raw.fileno()).st_size
    if self._size > MAX_BYTES:
      raise ValueError(f"it is larger than {MAX_BYTES / 1e9:g} GB")
    self._left = 16 * self._size + (1 << 26)

  def read(self, size: int | None = -1) -> bytes:
    if size is None or size < 0:
      size = self._size
    content = super().read(min(size, self._size))
    self._left -= len(content)
    if self._left < 0:
      raise ValueError("its parts are one and the same, over and over")
    return content


def _formats():
  Image.init()
  # Pillow may have been built without the libraries of some.
  return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image):
  sizes = [image.size]
  if image.format == "TIFF":  # A tile may be larger than its image.
    tags = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
    sizes.append(tuple(image.tag_v2.get(tag, 0) for tag in tags))
  for width, height in sizes:
    if not isinstance(width, int) or not isinstance(height, int):
      raise ValueError("its tiles are of no size")  # But bytes, or several.
    if width * height > MAX_PIXELS:
      raise ValueError(
        f"{width} x {height} pixels are more than {MAX_PIXELS / 1e6:g} million;"
        " make it smaller"
      )


def _check_scans(file):
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    if sum(1 for _ in re.finditer(b"\xff\xda", content)) > _MAX_SCANS:
      raise ValueError(f"it has more than {_MAX_SCANS} scans; save it anew")


def _rgb(image):
  """Converts an image, which may be changed."""
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
  """From greys of 0 to 65535, which Pillow's own conversion would clip."""
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
      f"an image array is {array.dtype} {list(array.shape)}: give uint8"
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
    return "it is empty" if empty else "it is no image that Pillow knows"
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__
