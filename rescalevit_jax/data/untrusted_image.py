"""Guards for image files that may come from anywhere."""

from collections.abc import Iterator
import contextlib
import functools
import io
import mmap
import os
import re

from PIL import Image
from PIL import TiffImagePlugin

# Reading takes up to 14 bytes a pixel: 1.1 GB at this size. AVIF and WebP files
# are also held in memory; 16 bits of 4 channels are 0.64 GB.
MAX_PIXELS = 80_000_000
MAX_BYTES = 1_000_000_000
# Each scan passes over all pixels of a JPEG file, however short it is: 10 s at
# this number. Other programs write about ten.
_MAX_SCANS = 2000

# For other formats, Pillow reads the header only, calls other programs
# (Ghostscript for EPS), or needs unbounded time or memory.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@functools.cache
def supported_formats() -> list[str]:
  """Return the entries of `FORMATS` that this build of Pillow supports."""
  supported = {*Image.registered_extensions().values()}
  return [name for name in FORMATS if name in supported]


@contextlib.contextmanager
def open_image(
  source: str | os.PathLike[str] | bytes,
) -> Iterator[Image.Image]:
  """Open an image of one of `FORMATS` for decoding.

  Args:
    source: a file's path, or its content.

  Raises:
    ValueError: the file is too large in bytes, pixels or scans.
    Exception: any type, from Pillow's decoders, also while decoding.
  """
  opened = (
    _BoundedBytes(source)
    if isinstance(source, bytes)
    else _BoundedFile(io.FileIO(source))
  )
  with opened as file, Image.open(file, formats=supported_formats()) as image:
    _check_size(image)
    if image.format in ("JPEG", "MPO"):
      if isinstance(source, bytes):
        _check_scans(source)
      else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
          _check_scans(content)
    yield image


class _Bound:
  """A bound on the size of one read and of all reads of a file together.

  Pillow requests as many bytes as a file declares, and Python allocates them
  first. With this bound, time is linear in the file's size: 1 s a MB at worst,
  for a damaged GIF.
  """

  def __init__(self, size: int):
    if size > MAX_BYTES:
      raise ValueError(f"it is larger than {MAX_BYTES / 1e9:g} GB")
    self._size = size
    self._left = 16 * size + (1 << 26)

  def largest(self, size: int | None) -> int:
    """Return how much of a requested size to read."""
    return self._size if size is None or size < 0 else min(size, self._size)

  def count(self, content: bytes) -> bytes:
    """Count what has been read; raise ValueError beyond the bound."""
    self._left -= len(content)
    if self._left < 0:
      raise ValueError("it refers to the same bytes over and over")
    return content


class _BoundedFile(io.BufferedReader):
  def __init__(self, raw: io.FileIO):
    super().__init__(raw)
    self._bound = _Bound(os.fstat(raw.fileno()).st_size)

  def read(self, size: int | None = -1) -> bytes:
    return self._bound.count(super().read(self._bound.largest(size)))


class _BoundedBytes(io.BytesIO):
  def __init__(self, content: bytes):
    super().__init__(content)
    self._bound = _Bound(len(content))

  def read(self, size: int | None = -1) -> bytes:
    return self._bound.count(super().read(self._bound.largest(size)))


def _check_size(image):
  sizes = [image.size]
  if image.format == "TIFF":  # A tile may be larger than its image.
    tags = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
    sizes.append(tuple(image.tag_v2.get(tag, 0) for tag in tags))
  for width, height in sizes:
    if not isinstance(width, int) or not isinstance(height, int):
      raise ValueError("the size of its tiles is not a number")
    if width * height > MAX_PIXELS:
      raise ValueError(
        f"{width} x {height} pixels are more than {MAX_PIXELS / 1e6:g} million;"
        " make it smaller"
      )


def _check_scans(content):
  if sum(1 for _ in re.finditer(b"\xff\xda", content)) > _MAX_SCANS:
    raise ValueError(f"it has more than {_MAX_SCANS} scans; save it again")
