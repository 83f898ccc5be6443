"""Guards for image files that may come from anywhere."""

from collections.abc import Iterator
import contextlib
import functools
import io
import os
import stat

from PIL import Image
from PIL import TiffImagePlugin

# TIFF tags and values.
_YCBCR = 6
_SUBSAMPLING = 530

# Reading takes up to 14 bytes a pixel: 1.1 GB at this size. The file is also
# held in memory; 16 bits of 4 channels are 0.64 GB.
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
def open_image(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
  """Open an image file of one of `FORMATS`, or its content, for decoding.

  Raises:
    ValueError: the file is too large in bytes, pixels or scans.
    Exception: any type, from Pillow's decoders, also while decoding.
  """
  content = source if isinstance(source, bytes) else _read(source)
  if not content:
    raise ValueError("it is empty")
  try:
    image = Image.open(_BoundedBytes(content), formats=supported_formats())
  except Image.UnidentifiedImageError as e:
    raise ValueError("its format is not supported") from e
  with image:
    _check_size(image)
    check_tiff(image)
    if image.format in ("JPEG", "MPO"):
      _check_scans(content)
    yield image


def _read(path):
  with open(path, "rb") as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):  # A pipe, of unknown size.
      return file.read(MAX_BYTES + 1)
    _check_bytes(status.st_size)
    return file.read(status.st_size)


class _BoundedBytes(io.BytesIO):
  """A file with a bound on the size of one read and of all reads together.

  Pillow requests as many bytes as a file declares, and Python allocates them
  first. With this bound, time is linear in the file's size: 1 s a MB at worst,
  for a damaged GIF.
  """

  def __init__(self, content: bytes):
    _check_bytes(len(content))
    super().__init__(content)
    self._size = len(content)
    self._left = 16 * self._size + (1 << 26)

  def read(self, size: int | None = -1) -> bytes:
    if size is None or size < 0:
      size = self._size
    content = super().read(min(size, self._size))
    self._left -= len(content)
    if self._left < 0:
      raise ValueError("it refers to the same bytes over and over")
    return content


def _check_bytes(size):
  if size > MAX_BYTES:
    raise ValueError(f"it is larger than {MAX_BYTES / 1e9:g} GB")


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


def check_tiff(image: Image.Image) -> None:
  """Raise a ValueError for a TIFF image whose pixels Pillow reads wrongly."""
  if image.format != "TIFF":
    return
  tags = image.tag_v2  # type: ignore[attr-defined]
  bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
  samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
  compressed = tags.get(TiffImagePlugin.COMPRESSION, 1) != 1
  signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
  planes = samples > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
  photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
  problem = None
  if bits not in (1, 2, 4, 8, 16, 32):
    problem = f"{bits} bits per channel"  # Not scaled.
  elif signed and (bits == 8 or (compressed and tags.prefix == b"MM")):
    problem = "signed integers"  # Read as unsigned, or in another byte order.
  elif bits == 16 and photometric == 0:
    problem = "16 bits per channel and white as 0"  # Not inverted.
  elif planes and (bits == 16 or samples == 2):
    problem = "a separate plane for each channel"  # Mixed up.
  elif photometric == _YCBCR and not compressed:
    if tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
      problem = "subsampled colors without compression"  # Mixed up.
  if problem:
    raise ValueError(f"it has {problem}; save it with 8 bits as RGB")


def _check_scans(content):
  if content.count(b"\xff\xda") > _MAX_SCANS:
    raise ValueError(f"it has more than {_MAX_SCANS} scans; save it again")
