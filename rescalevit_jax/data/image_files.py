"""Find, read and resize image files: for training, evaluation and prediction.

Every command reads images here. An image becomes 8-bit RGB as follows:

- Of an animation or of several pages, the first image is read.
- The EXIF orientation is applied.
- Colors are converted to sRGB if the file has another ICC profile.
- 16-bit grays are rounded to 8 bits; of 16-bit colors the upper 8 bits remain.
- Transparent parts become white.
- Palettes, CMYK, gray and black-and-white images become RGB.

Images of floats, grays outside of 16 bits, and TIFF files that Pillow reads
wrongly are refused.
"""

import dataclasses
import functools
import io
import os
import pathlib

from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image
from PIL import ImageCms
from PIL import ImageOps

from rescalevit_jax import errors
from rescalevit_jax.data import untrusted_image

Source = str | os.PathLike[str] | Image.Image | np.ndarray

RESIZE_METHODS = ("squash", "crop")

# Factors from 1, 2 and 4 bits to 8, by Pillow's raw mode.
_GRAY_FACTORS = {"1": 255, "L;2": 85, "L;4": 17}


@dataclasses.dataclass(frozen=True)
class Resize:
  """The first resizing of an image, on the host; `augment` does the second.

  The fields are the config keys `data.image_size`, `data.resize` and
  `data.crop_ratio`.
  """

  image_size: int | None = None
  method: str = "squash"
  crop_ratio: float = 0.875

  def __call__(self, image: Image.Image) -> Image.Image:
    """Resize an RGB image."""
    size = self.image_size
    if size is None:
      return image
    if self.method == "squash":
      return image.resize((size, size), Image.Resampling.BILINEAR)
    short = round(size / self.crop_ratio)
    width, height = (
      max(size, short * edge // min(image.size)) for edge in image.size
    )
    left, top = round((width - size) / 2), round((height - size) / 2)
    if width * height > untrusted_image.MAX_PIXELS:  # It is a narrow strip.
      x, y = image.width / width, image.height / height
      box = (left * x, top * y, (left + size) * x, (top + size) * y)
      return image.resize((size, size), Image.Resampling.BILINEAR, box)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))

  @property
  def key(self) -> str:
    """A name for caches; empty without resizing."""
    if self.image_size is None:
      return ""
    if self.method == "squash":
      return f"-{self.image_size}"
    return f"-{self.image_size}-crop{self.crop_ratio:g}"


def decode(content: bytes, resize: Resize) -> UInt8[np.ndarray, "H W 3"]:
  """Decode a file's content; damaged content may raise any exception."""
  with untrusted_image.open_image(content) as image:
    return np.asarray(resize(_rgb(image)))


def find(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Return the image files in a folder and its subfolders, sorted.

  Files are recognized by their names. Hidden files and folders are skipped, and
  links to folders are not followed. Links to missing files are included;
  reading them raises an error.
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
      and (path.is_file() or not path.exists())
    ]
  return sorted(found)


def read(image: Source) -> Image.Image:
  """Read an image as 8-bit RGB; see the module's docstring.

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
        f"{os.fspath(image)}: cannot be read as an image ({_reason(e)});"
        " choose another file"
      ) from e
  if isinstance(image, Image.Image):
    try:
      untrusted_image.check_tiff(image)
      color = _transparent_color(image)  # `copy` loads the image.
      copied = image.copy()
      if color is not None:
        copied.info["transparency"] = color
      return _rgb(copied)
    except Exception as e:  # Its file may be read only now.
      raise errors.UserError(
        f"a {image.mode} image cannot be converted ({_reason(e)}); convert it"
        " to RGB"
      ) from e
  return _from_array(np.asarray(image))


def model_input(
  image: Source, size: int, resize: Resize = Resize()
) -> Float[np.ndarray, "S S 3"]:
  """Read and resize an image as evaluation does, to values in [-1, 1].

  After the first resizing by `resize`, the image becomes S x S, of edge `size`.
  """
  rgb = resize(read(image))
  x = np.empty((size, size, 3), np.float32)
  for i in range(3):
    # One float32 channel at a time: Pillow would round the pixels of RGB.
    channel = rgb.getchannel(i).convert("F")
    channel = channel.resize((size, size), Image.Resampling.BILINEAR)
    x[..., i] = np.asarray(channel)
  return x / np.float32(127.5) - 1


def _rgb(image):
  """Convert an image to RGB; the image may be changed."""
  if (color := _transparent_color(image)) is not None:
    image.info["transparency"] = color
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I"):
    profile = image.info.get("icc_profile")
    transparent = image.info.get("transparency")
    grays = np.asarray(image)
    image = _eight_bits(grays)
    image.info["icc_profile"] = profile
    if transparent is not None:
      image.putalpha(Image.fromarray(grays != transparent))
  elif image.mode == "F":
    raise ValueError("its pixels are floats; save it with 8 or 16 bits")
  if not image.has_transparency_data:
    return _to_srgb(image)
  rgba = image.convert("RGBA")
  opaque = rgba.convert("L" if image.mode in ("L", "LA") else "RGB")
  opaque.info = {**image.info, "transparency": None}
  white = Image.new("RGB", image.size, "white")
  white.paste(_to_srgb(opaque), mask=rgba.getchannel("A"))
  return white


def _to_srgb(image):
  """Convert an opaque image to RGB, by its ICC profile if there is one."""
  if image.mode in ("P", "1"):
    image = image.convert("RGB")
  profile = _profile(image.info.get("icc_profile"), image.mode)
  if profile is None:
    return image.convert("RGB")
  try:
    return ImageCms.profileToProfile(
      image, profile, _srgb_profile(), outputMode="RGB"
    )
  except ImageCms.PyCMSError:  # Damaged.
    return image.convert("RGB")


@functools.cache
def _srgb_profile():
  return ImageCms.createProfile("sRGB")


def _profile(content, mode):
  """Open an ICC profile; None if it does not apply or describes sRGB."""
  if not content:
    return None
  modes = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = ImageCms.getProfileDescription(profile)
    space = modes.get(profile.profile.xcolor_space.strip())
  except (OSError, ValueError, ImageCms.PyCMSError):
    return None  # Damaged: most programs ignore it.
  return None if space != mode or "sRGB" in name else profile


def _transparent_color(image):
  """Return the transparent color of a PNG that is not loaded, in 8 bits.

  Pillow converts the pixels, but not this color. Of 16-bit colors, all with
  equal upper 8 bits become transparent.
  """
  color = image.info.get("transparency")
  if image.format != "PNG" or color is None or not image.tile:
    return color
  stored = image.tile[0][3]
  if stored in _GRAY_FACTORS:
    return color * _GRAY_FACTORS[stored]
  if stored == "RGB;16B":
    return tuple(x >> 8 for x in color)
  return color


def _eight_bits(grays):
  """Convert grays of 0 to 65535; Pillow's own conversion would clip them."""
  if grays.min() < 0 or grays.max() > 65535:
    raise ValueError(
      f"its grays go from {grays.min()} to {grays.max()}; save it with 8 or"
      " 16 bits"
    )
  grays = grays.astype(np.int32)
  grays += 128
  grays //= 257
  return Image.fromarray(grays.astype(np.uint8))


def _from_array(array):
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[..., 0]
  has_channels = array.ndim == 2 or array.shape[2:] == (3,)
  if array.dtype != np.uint8 or not has_channels or not array.size:
    raise errors.UserError(
      f"an image array is {array.dtype} {list(array.shape)}; give uint8"
      " [H, W, 3], or [H, W] for grays"
    )
  return Image.fromarray(array).convert("RGB")


def _reason(error):
  if isinstance(error, FileNotFoundError):
    return "no such file"
  if isinstance(error, IsADirectoryError):
    return "this is a folder"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__
