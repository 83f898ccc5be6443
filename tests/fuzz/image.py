"""Image files for predictions."""

import io
import pathlib
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from fuzz import choices as choices_lib
from rescalevit_jax.data import image_files
from rescalevit_jax.data import untrusted_image

_PIXELS = 1_000_000  # Replaces untrusted_image.MAX_PIXELS.


def tiff(tags: dict[int, tuple[int, int]], pixels: bytes = b"") -> bytes:
  """Return a TIFF file.

  Args:
    tags: type and value by tag number; pixels start at offset 8.
    pixels: encoded pixels.
  """
  directory = b"".join(
    struct.pack("<HHLL", tag, kind, 1, value)
    for tag, (kind, value) in sorted(tags.items())
  )
  return b"".join(
    (
      b"II*\0",
      struct.pack("<L", 8 + len(pixels)),
      pixels,
      struct.pack("<H", len(tags)),
      directory,
      bytes(4),
    )
  )


def tiled(edge: int, compression: int, pixels: bytes) -> bytes:
  """Return a gray TIFF image of 16 x 16 pixels with tiles of any size."""
  values = {
    **{256: 16, 257: 16, 258: 8, 259: compression, 262: 1, 277: 1},
    **{322: edge, 323: edge, 324: 8, 325: len(pixels)},
  }
  return tiff({tag: (4, value) for tag, value in values.items()}, pixels)


def _saved(image, kind, **kwargs):
  file = io.BytesIO()
  image.save(file, kind, **kwargs)
  return file.getvalue()


def _good():
  rng = np.random.default_rng(0)
  color = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
  gray, deep = color.convert("L"), Image.new("I;16", (9, 5), 30_000)
  palette, clear = color.quantize(16), color.convert("RGBA")
  exif = Image.Exif()
  exif[0x112] = 6
  exif[0x10E] = "what the image shows"
  more = dict(save_all=True, append_images=[color.rotate(90)])
  yield from (
    _saved(color, "PNG", exif=exif),
    _saved(palette, "PNG", transparency=b"\xff\0"),
    _saved(deep, "PNG"),
    _saved(color, "PNG", **more),
    _saved(color, "JPEG", exif=exif),
    _saved(color, "JPEG", progressive=True),
    _saved(color.convert("CMYK"), "JPEG"),
    _saved(color, "MPO", **more),
    _saved(palette, "GIF", transparency=1),
    _saved(color, "GIF", **more),
    _saved(color, "WEBP", exif=exif),
    _saved(clear, "WEBP", lossless=True),
    _saved(color, "WEBP", **more),
    _saved(color, "BMP"),
    _saved(palette, "BMP"),
    _saved(color, "PPM"),
    b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12",
    _saved(color.convert("1"), "PPM"),
    tiled(16, 1, bytes(range(256))),
    tiled(16, 8, zlib.compress(bytes(range(256)))),
    _saved(deep, "TIFF"),
  )
  for packing in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
    yield _saved(color, "TIFF", compression=packing, exif=exif)
  yield _saved(gray.convert("1"), "TIFF", compression="group4")
  if "AVIF" in Image.OPEN:
    yield _saved(color, "AVIF", exif=exif)
  # Contents that are not images.
  yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


_GOOD = tuple(_good())
_MARKERS = b"\xc0\xc2\xc4\xd8\xd9\xda\xdb\xdd\xe0\xe1\xe2\xee\xfe"


def build(choices: choices_lib.Choices) -> bytes:
  """Return an image file."""
  content = choices.pick(_GOOD)
  chunks = content.startswith(b"\x89PNG") and choices.below(8)
  while choices and len(content) < 1 << 16:
    if choices.below(4):
      content = choices_lib.edit(content, choices)
    elif content.startswith(b"II*"):
      content = _tag(content, choices)
    elif content.startswith(b"\xff\xd8"):
      content = _segment(content, choices)
    elif content.startswith(b"\x89PNG"):
      content = _chunk(content, choices)
    else:
      content += content
  return _checksums(content) if chunks else content


def _tag(content, choices):
  """Change, add or duplicate an entry of TIFF's first directory."""
  content = bytearray(content)
  start = struct.unpack("<L", content[4:8].ljust(4, b"\0"))[0]
  entry = start + 2 + 12 * choices.below(16)
  number = choices.number() % 2**32
  where = choices.pick((0, 2, 4, 8, 8))
  if where < 4:
    content[entry + where : entry + where + 2] = struct.pack("<H", number % 400)
  else:
    content[entry + where : entry + where + 4] = struct.pack("<L", number)
  return bytes(content)


def _segment(content, choices):
  """Add a segment to a JPEG file."""
  data = choices.word() * choices.pick((1, 1, 100))
  segment = b"\xff%c" % choices.pick(_MARKERS)
  segment += struct.pack(">H", 2 + len(data)) + data
  where = [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]", content)]
  where = choices.pick(where or [0])
  return content[:where] + segment * choices.pick((1, 1, 50)) + content[where:]


def _chunk(content, choices):
  """Add a chunk to a PNG file."""
  kinds = b"IDAT tEXt zTXt iTXt iCCP eXIf tRNS PLTE gAMA acTL fcTL fdAT IHDR"
  data = choices.word()
  if choices.below(2):
    data += b"\0\0" + zlib.compress(bytes(choices.below(1 << 22)))
  chunk = struct.pack(">L", len(data)) + choices.pick(kinds.split()) + data
  where = choices.pick((33, 33, len(content) - 12))
  return content[:where] + chunk + bytes(4) + content[where:]


def _checksums(content):
  """Correct the checksums of a PNG file."""
  content = bytearray(content)
  at = 8
  while at + 8 <= len(content):
    (size,) = struct.unpack_from(">L", content, at)
    end = at + 8 + size
    content[end : end + 4] = struct.pack(
      ">L", zlib.crc32(content[at + 4 : end])
    )
    at = end + 4
  return bytes(content)


def run(path: pathlib.Path) -> None:
  pixels, untrusted_image.MAX_PIXELS = untrusted_image.MAX_PIXELS, _PIXELS
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      x = image_files.model_input(path, 4)
  finally:
    untrusted_image.MAX_PIXELS = pixels
  assert x.shape == (4, 4, 3) and x.dtype == np.float32
  assert np.abs(x).max() <= 1
