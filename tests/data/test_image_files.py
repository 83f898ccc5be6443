"""Reading valid and invalid image files as model input."""

import io
import os
import struct
import subprocess
import tracemalloc
import zlib

from fuzz import image as fuzzed
import numpy as np
from PIL import Image
import pytest

from rescalevit_jax import errors
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import image_files
from rescalevit_jax.data import untrusted_image

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ORIENTATION = 0x112
TURNED = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x.swapaxes(0, 1)[:, ::-1],
  7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
  8: lambda x: x.swapaxes(0, 1)[::-1],
}


def pixels(image):
  result = image_files.read(image)
  assert result.mode == "RGB"
  return np.asarray(result)


def saved(folder, image, name, **kwargs):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(folder / name, **kwargs)
  return folder / name


def rgb(gray):
  return np.stack([gray] * 3, axis=-1)


def refused(image, *words):
  with pytest.raises(errors.UserError) as caught:
    image_files.model_input(image, 4)
  message = str(caught.value)
  assert len(message.splitlines()) == 1
  for word in words:
    assert word in message
  return message


# Pixel formats.


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "A.PNG"])
def test_colors_are_kept(name, tmp_path):
  np.testing.assert_array_equal(pixels(saved(tmp_path, COLOR, name)), COLOR)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.gif"])
def test_lossy_files_give_similar_pixels(name, tmp_path):
  smooth = np.zeros((16, 24, 3), np.uint8) + np.array([200, 120, 40], np.uint8)
  smooth[:, 12:] = 90
  found = pixels(saved(tmp_path, smooth, name)).astype(int)
  assert np.abs(found - smooth)[:, [2, -2]].max() < 8


def test_grays_have_three_equal_channels(tmp_path):
  found = pixels(saved(tmp_path, GRAY, "a.png"))
  np.testing.assert_array_equal(found, rgb(GRAY))


def test_one_bit_images_are_black_and_white(tmp_path):
  bits = Image.fromarray(GRAY > 100)
  assert bits.mode == "1"
  found = pixels(saved(tmp_path, bits, "a.png"))
  np.testing.assert_array_equal(found, rgb((GRAY > 100) * np.uint8(255)))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_are_rounded_to_eight(name, tmp_path):
  ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
  expected = np.round(ramp / 257).astype(np.uint8)
  assert expected[0, 0] == 0 and expected[-1, -1] == 255
  path = saved(tmp_path, ramp, name)
  assert Image.open(path).mode == "I;16"
  np.testing.assert_array_equal(pixels(path), rgb(expected))


def test_other_sixteen_bit_modes_are_rounded_to_eight():
  ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
  big = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
  wide = Image.fromarray(ramp.astype(np.int32))
  assert wide.mode == "I"
  expected = rgb(np.arange(256, dtype=np.uint8).reshape(16, 16))
  np.testing.assert_array_equal(pixels(big), expected)
  np.testing.assert_array_equal(pixels(wide), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(mode, tmp_path):
  image = np.zeros((1, 3, 4), np.uint8) + np.array([40, 40, 40, 0], np.uint8)
  image[0, :, 3] = 0, 255, 128
  image = Image.fromarray(image).convert(mode)
  found = pixels(saved(tmp_path, image, "a.png"))
  half = 40 * 128 / 255 + 255 * 127 / 255
  np.testing.assert_allclose(found[0, :, 0], [255, 40, half], atol=0.5)
  np.testing.assert_array_equal(found, rgb(found[..., 0]))


@pytest.mark.parametrize(
  "name, transparency",
  [
    ("a.png", None),
    ("a.png", 1),
    ("a.png", b"\xff\x00"),
    ("a.gif", None),
    ("a.gif", 1),
  ],
)
def test_palette_images(name, transparency, tmp_path):
  image = Image.new("P", (2, 1))
  image.putpalette([10, 20, 30, 40, 50, 60])
  image.putpixel((1, 0), 1)
  kwargs = {} if transparency is None else {"transparency": transparency}
  found = pixels(saved(tmp_path, image, name, **kwargs))
  second = [40, 50, 60] if transparency is None else [255, 255, 255]
  assert found.tolist() == [[[10, 20, 30], second]]


@pytest.mark.parametrize(
  "image, transparency, expected",
  [
    (np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8), (1, 2, 3), [9, 8, 7]),
    (np.array([[9, 1]], np.uint8), 1, [9, 9, 9]),
  ],
)
def test_a_transparent_color_becomes_white(
  image, transparency, expected, tmp_path
):
  path = saved(tmp_path, image, "a.png", transparency=transparency)
  assert pixels(path).tolist() == [[expected, [255, 255, 255]]]


@pytest.mark.parametrize(
  "bits, row, transparent, expected",
  [
    (1, [0b01000000], [0], [255, 255]),
    (2, [0b01100000], [1], [255, 170]),
    (4, [0x5A], [5], [255, 170]),
    (16, [10, 0, 0, 0], [0x0A00], [255, 0]),
  ],
)
def test_transparent_grays_of_other_depths(bits, row, transparent, expected):
  found = decode_png(bits, 0, row, transparent)
  assert found[0, :, 0].tolist() == expected


def test_a_transparent_color_of_sixteen_bits():
  row = [10, 0] * 3 + [0, 0] * 3
  found = decode_png(16, 2, row, [0x0A00] * 3)
  assert found[0].tolist() == [[255] * 3, [0] * 3]


def test_transparency_of_a_pillow_image_equals_that_of_its_file():
  content = png_of_two(4, 0, [0x5A], [5])
  with Image.open(io.BytesIO(content)) as image:
    found = np.asarray(image_files.read(image))
  assert found[0, :, 0].tolist() == [255, 170]


def decode_png(*args):
  return image_files.decode(png_of_two(*args), image_files.Resize())


def png_of_two(bits, color_type, row, transparent):
  """Return a PNG of two pixels, which Pillow cannot write."""
  return png(
    (2, 1, bits, color_type),
    tRNS=b"".join(x.to_bytes(2, "big") for x in transparent),
    IDAT=zlib.compress(bytes([0, *row])),
    IEND=b"",
  )


def png(header, **chunks):
  """Return a PNG file of any chunks after a header of size, bits and colors."""
  content = b"\x89PNG\r\n\x1a\n"
  chunks = {"IHDR": struct.pack(">IIBBBBB", *header, 0, 0, 0)} | chunks
  for name, data in chunks.items():
    named = name.encode() + data
    content += struct.pack(">I", len(data)) + named
    content += struct.pack(">I", zlib.crc32(named))
  return content


@pytest.mark.parametrize("size", [24, 32, 40])
def test_files_of_any_size_are_cropped(size):
  image = Image.new("RGB", (size, size))
  image.paste("white", (0, 0, size, size // 8))
  file = io.BytesIO()
  image.save(file, "PNG")
  resize = image_files.Resize(32, "crop", 0.5)
  # The white margin is cut off.
  assert image_files.decode(file.getvalue(), resize).max() < 10


def test_cmyk_images_become_rgb(tmp_path):
  image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
  path = saved(tmp_path, image, "a.jpg")
  assert Image.open(path).mode == "CMYK"
  cyan = np.array([0, 255, 255])
  assert np.abs(pixels(path).astype(int) - cyan).max() < 6


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation, tmp_path):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  path = saved(tmp_path, COLOR, "a.png", exif=exif)
  expected = TURNED[orientation](COLOR)
  np.testing.assert_array_equal(pixels(path), expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.tiff"])
def test_exif_orientation_of_other_formats(name, tmp_path):
  image = np.zeros((32, 48, 3), np.uint8)
  image[:16, :16] = 255
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  found = pixels(saved(tmp_path, image, name, exif=exif))
  assert found.shape == (48, 32, 3)
  assert found[8, 24].min() > 240 and found[8, 8].max() < 15


def test_exif_orientation_of_sixteen_bits(tmp_path):
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  path = saved(tmp_path, GRAY.astype(np.uint16) * 257, "a.png", exif=exif)
  np.testing.assert_array_equal(pixels(path), TURNED[6](rgb(GRAY)))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation_is_read(name, tmp_path):
  first, second = (Image.new("RGB", (8, 8), c) for c in ("red", "blue"))
  kwargs = {"lossless": True} if name == "a.webp" else {}
  path = saved(
    tmp_path, first, name, save_all=True, append_images=[second], **kwargs
  )
  assert Image.open(path).n_frames == 2
  assert pixels(path)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000), (1, 500)])
def test_images_of_any_size_are_resized(size, tmp_path):
  path = saved(tmp_path, Image.new("RGB", size, (0, 255, 51)), "a.png")
  x = image_files.model_input(path, 6)
  assert x.shape == (6, 6, 3) and x.dtype == np.float32
  np.testing.assert_allclose(x[3, 4], [-1, 1, -0.6], atol=1e-6)


# Consistency with evaluation.


@pytest.mark.parametrize(
  "shape, size",
  [
    ((8, 8), 8),
    ((8, 8), 12),
    ((32, 32), 224),
    ((32, 32), 20),
    ((45, 30), 16),
    ((1, 1), 8),
    ((1, 9), 4),
    ((100, 3), 7),
    ((250, 333), 32),
  ],
)
def test_pixels_equal_the_input_of_evaluation(shape, size):
  image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
  expected = np.asarray(preprocess.prepare(image[None], size))[0]
  found = image_files.model_input(image, size)
  # Tolerance of 1/80 gray level, because `prepare` uses float32.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# Python API.


def test_paths_images_and_arrays_are_equal(tmp_path):
  path = saved(tmp_path, COLOR, "a.png")
  for source in (path, str(path), Image.open(path), COLOR):
    np.testing.assert_array_equal(pixels(source), COLOR)
  for source in (GRAY, GRAY[..., None]):
    np.testing.assert_array_equal(pixels(source), rgb(GRAY))


def test_input_image_is_not_changed():
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  file = io.BytesIO()
  Image.fromarray(COLOR).save(file, "PNG", exif=exif)
  image = Image.open(file)
  np.testing.assert_array_equal(pixels(image), TURNED[6](COLOR))
  assert image.getexif()[ORIENTATION] == 6
  np.testing.assert_array_equal(np.asarray(image), COLOR)


@pytest.mark.parametrize(
  "array, words",
  [
    (COLOR.astype(np.float32), ("float32", "uint8")),
    (COLOR.astype(np.int64), ("int64",)),
    (COLOR[None], ("[1, 5, 7, 3]",)),
    (COLOR.transpose(2, 0, 1), ("[3, 5, 7]", "[H, W, 3]")),
    (COLOR[..., :2], ("[5, 7, 2]",)),
    (COLOR[0, 0], ("[3]",)),
    (COLOR[:0], ("[0, 7, 3]",)),
    (None, ("object",)),
  ],
)
def test_invalid_image_arrays(array, words):
  refused(array, *words)


@pytest.mark.parametrize(
  "array",
  [
    GRAY.astype(np.int32) * 1000,
    GRAY.astype(np.int32) - 200,
    GRAY.astype(np.float32),
  ],
)
def test_gray_images_of_unknown_range_are_refused(array, tmp_path):
  refused(Image.fromarray(array), "16 bits")
  refused(saved(tmp_path, array, "a.tiff"), "a.tiff", "16 bits")


def test_tiff_files_of_32_bits_within_16_bits_are_read(tmp_path):
  path = saved(tmp_path, GRAY.astype(np.int32) * 257, "a.tiff")
  np.testing.assert_array_equal(pixels(path), rgb(GRAY))


@pytest.mark.parametrize(
  "tags, words",
  [
    ({258: (3, 12)}, "12 bits per channel; save it with 8 bits"),
    ({339: (3, 2)}, "signed integers"),
    ({258: (3, 16), 262: (3, 0)}, "16 bits per channel and white as 0"),
    ({258: (3, 16), 262: (3, 2), 277: (3, 3), 284: (3, 2)}, "separate plane"),
    ({277: (3, 2), 284: (3, 2), 338: (3, 2)}, "separate plane"),
    ({262: (3, 6), 277: (3, 3)}, "subsampled colors without compression"),
  ],
)
def test_tiff_files_that_pillow_reads_wrongly_are_refused(
  tags, words, tmp_path
):
  pixels = bytes(4 * 4 * 12)
  tags = {
    **{256: (4, 4), 257: (4, 4), 258: (3, 8), 259: (4, 1), 262: (3, 1)},
    **{273: (4, 8)},
    **{277: (3, 1), 278: (4, 4), 279: (4, len(pixels))},
    **tags,
  }
  path = tmp_path / "a.tiff"
  path.write_bytes(fuzzed.tiff(tags, pixels))
  refused(path, words)
  with Image.open(path) as image:
    refused(image, words)


def test_a_pipe_is_read():
  content = io.BytesIO()
  Image.fromarray(COLOR).save(content, "PNG")
  reader, writer = os.pipe()
  with open(writer, "wb") as file:
    file.write(content.getvalue())
  np.testing.assert_array_equal(pixels(f"/dev/fd/{reader}"), COLOR)
  os.close(reader)


def test_a_damaged_pillow_image_is_refused(tmp_path):
  path = saved(tmp_path, np.tile(COLOR, (20, 20, 1)), "a.jpg")
  path.write_bytes(path.read_bytes()[:-500])
  refused(Image.open(path), "truncated")


# Invalid files.


def test_paths_without_an_image_are_refused(tmp_path):
  def path(name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name

  text = path("text.png", b"not an image")
  assert str(text) in refused(text, "format is not supported")
  refused(str(path("empty.png", b"")), "empty.png", "it is empty")
  refused(tmp_path / "none.png", "none.png", "no such file")
  (tmp_path / "folder.png").mkdir()
  refused(tmp_path / "folder.png", "folder.png", "this is a folder")
  (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
  refused(tmp_path / "loop.png", "loop.png", "symbolic links")
  refused(tmp_path / ("x" * 300), "too long")


def test_truncated_files_are_refused(tmp_path):
  path = saved(tmp_path, np.tile(COLOR, (20, 20, 1)), "a.jpg")
  path.write_bytes(path.read_bytes()[:-500])
  refused(path, "a.jpg", "truncated")


def test_permission_error_is_one_line(tmp_path, monkeypatch):
  path = saved(tmp_path, COLOR, "a.png")

  def refuse(path, formats):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(Image, "open", refuse)
  assert refused(path, "Permission denied").count("a.png") == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("edge", [8_950, 12_000, 60_000])
def test_decompression_bombs_are_refused(edge, tmp_path):
  bomb = png((edge, edge, 8, 2), IDAT=zlib.compress(bytes(100)))
  (tmp_path / "bomb.png").write_bytes(bomb)
  refused(tmp_path / "bomb.png", "bomb.png", "pixels")


def test_number_of_jpeg_scans_is_limited(tmp_path):
  path = saved(tmp_path, COLOR, "a.jpg", progressive=True)
  content = path.read_bytes()
  scan = content[content.rindex(b"\xff\xda") : -2]
  path.write_bytes(content[:-2] + 100 * scan + content[-2:])
  assert pixels(path).shape == (5, 7, 3)
  path.write_bytes(content[:-2] + 2000 * scan + content[-2:])
  refused(path, "a.jpg", "more than 2000 scans")


def test_file_size_is_limited(tmp_path):
  # Pillow would read the whole file.
  path = saved(tmp_path, COLOR, "a.webp")
  os.truncate(path, untrusted_image.MAX_BYTES + 1)
  refused(path, "a.webp", "larger than 1 GB")


def test_memory_for_a_chunk_longer_than_its_file_is_bounded(tmp_path):
  path = saved(tmp_path, COLOR, "a.png")
  content = path.read_bytes()
  where = content.index(b"IDAT") - 4
  path.write_bytes(content[:where] + b"\xff\xff" + content[where + 2 :])
  tracemalloc.start()
  try:
    image_files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()


def test_overlapping_tiff_strips_are_refused(tmp_path):
  # Pillow would read 64 kB for each strip.
  count, start = 20_000, 8
  pixels = bytes(1 << 16)
  offsets = np.full(count, start, np.uint32).tobytes()
  tags = {
    **{256: (4, 1), 257: (4, count), 258: (4, 8), 259: (4, 1), 262: (4, 1)},
    **{277: (4, 1), 278: (4, 1), 273: (4, start + len(pixels))},
  }
  content = bytearray(fuzzed.tiff(tags, pixels + offsets))
  where = content.index(struct.pack("<HHLL", 273, 4, 1, start + len(pixels)))
  struct.pack_into("<L", content, where + 4, count)
  (tmp_path / "a.tiff").write_bytes(content)
  refused(tmp_path / "a.tiff", "over and over")


@pytest.mark.parametrize("edge", [9_000, 60_000])
def test_decompression_bombs_in_tiles_are_refused(edge, tmp_path):
  path = tmp_path / "bomb.tiff"
  pixels = zlib.compress(bytes(10_000_000))
  path.write_bytes(fuzzed.tiled(edge, 8, pixels))
  with Image.open(path) as opened:
    assert opened.size == (16, 16)
  refused(path, f"{edge} x {edge} pixels are more than 80 million")
  path.write_bytes(fuzzed.tiled(32, 8, zlib.compress(bytes(range(256)) * 4)))
  assert pixels_of_tile(path) == [0, 15]


def test_nonnumeric_tile_size_is_refused(tmp_path):
  # In Python, multiplying bytes by a number repeats them.
  content = fuzzed.tiled(16, 8, zlib.compress(bytes(256)))
  width = struct.pack("<HHLL", 322, 4, 1, 16)
  assert width in content
  content = content.replace(width, struct.pack("<HHLL", 322, 7, 1, 16))
  (tmp_path / "a.tiff").write_bytes(content)
  refused(tmp_path / "a.tiff", "size of its tiles")


def pixels_of_tile(path):
  return pixels(path)[0, [0, 15], 0].tolist()


def test_other_formats_are_refused(tmp_path, monkeypatch):
  image = Image.fromarray(COLOR)
  image.save(tmp_path / "a.ico")
  image.save(tmp_path / "b.tga")
  image.save(tmp_path / "c.eps")
  called = []
  monkeypatch.setattr(subprocess, "check_call", called.append)
  for path in sorted(tmp_path.iterdir()):
    refused(path.rename(path.with_suffix(".png")), "format is not supported")
  assert not called  # Pillow would run Ghostscript on .eps.


def test_number_of_pixels_is_limited(tmp_path, monkeypatch):
  path = saved(tmp_path, COLOR, "a.png")
  monkeypatch.setattr(untrusted_image, "MAX_PIXELS", 35)
  assert pixels(path).shape == (5, 7, 3)
  monkeypatch.setattr(untrusted_image, "MAX_PIXELS", 34)
  refused(path, "7 x 5 pixels")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff"]
)
def test_any_damage_is_a_one_line_error(name, tmp_path):
  whole = saved(tmp_path, COLOR, name).read_bytes()
  rng = np.random.default_rng(1)
  path = tmp_path / f"bad{name}"
  refusals = 0
  for _ in range(100):
    damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
    for place in rng.integers(0, len(damaged), 3):
      damaged[place] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      image_files.model_input(path, 4)
    except errors.UserError as e:
      refusals += 1
      assert str(path) in str(e) and len(str(e).splitlines()) == 1
  assert refusals > 20


# Folders.


def test_find_returns_image_files(tmp_path):
  names = [
    "b.JPG",
    "a.png",
    "sub/c.webp",
    "sub/deep/d.tif",
    "a/z.bmp",
    ".hidden.png",
    ".git/e.png",
    "sub/.f/g.png",
    "notes.txt",
    "png",
    "data.h5",
    "film.mpg",
    "page.eps",
    "paper.pdf",
  ]
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  (tmp_path / "folder.png").mkdir()
  (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
  expected = ["a/z.bmp", "a.png", "b.JPG", "gone.png"]
  expected += ["sub/c.webp", "sub/deep/d.tif"]
  assert image_files.find(tmp_path) == [tmp_path / name for name in expected]
  assert image_files.find(str(tmp_path / ".git")) == [tmp_path / ".git/e.png"]


def test_find_in_an_unreadable_folder(tmp_path):
  with pytest.raises(errors.UserError, match="none: cannot be listed"):
    image_files.find(tmp_path / "none")


def icc_profile(primaries, gamma, space=b"RGB "):
  """Return an ICC profile (version 2) of one gamma curve.

  Args:
    primaries: XYZ of red, green and blue, adapted to D50; None for grays.
    gamma: exponent of the curves.
    space: color space.
  """

  def xyz(values):
    return struct.pack(">3i", *(round(x * 65536) for x in values))

  curve = b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)
  white = (0.9642, 1.0, 0.8249)
  tags = {
    b"desc": b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(79),
    b"wtpt": b"XYZ " + bytes(4) + xyz(white),
  }
  if primaries is None:
    tags[b"kTRC"] = curve
  else:
    for name, values in zip((b"r", b"g", b"b"), primaries, strict=True):
      tags[name + b"XYZ"] = b"XYZ " + bytes(4) + xyz(values)
      tags[name + b"TRC"] = curve
  table, data = struct.pack(">I", len(tags)), b""
  for name, content in tags.items():
    start = 132 + 12 * len(tags) + len(data)
    table += name + struct.pack(">II", start, len(content))
    data += content
  size = 128 + len(table) + len(data)
  head = struct.pack(
    ">II4B4s4s4s", size, 0, 2, 64, 0, 0, b"mntr", space, b"XYZ "
  )
  head += bytes(12) + b"acsp" + bytes(28) + xyz(white)
  return head + bytes(128 - len(head)) + table + data


# Adobe RGB (1998), version 2005-05, section 4.3.5.3, adapted to D50.
ADOBE = (
  (0.60974, 0.31111, 0.01947),
  (0.20528, 0.62567, 0.06087),
  (0.14919, 0.06322, 0.74457),
)


def encoded(image, icc, **kwargs):
  file = io.BytesIO()
  image.save(file, "PNG", icc_profile=icc, **kwargs)
  return file.getvalue()


def first_pixel(content):
  decoded = image_files.decode(content, image_files.Resize())
  return decoded[0, 0].astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "transparency"])
def test_wide_colors_become_srgb(mode):
  kwargs = {"transparency": (1, 2, 3)} if mode == "transparency" else {}
  image = Image.new("RGB", (2, 2), (200, 30, 30))
  if mode == "RGBA":
    image.putalpha(255)
  found = first_pixel(encoded(image, icc_profile(ADOBE, 563 / 256), **kwargs))
  assert np.abs(found - (233, 24, 24)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_linear_grays_become_srgb(mode):
  color = {"L": 100, "LA": (100, 255), "I;16": 25700}[mode]
  content = encoded(
    Image.new(mode, (2, 2), color), icc_profile(None, 1.0, b"GRAY")
  )
  # sRGB of 100 / 255, IEC 61966-2-1: 255 (1.055 x^(1/2.4) - 0.055)
  assert np.abs(first_pixel(content) - 169).max() <= 1


@pytest.mark.parametrize(
  "damage",
  [
    (b"rTRC", b"xTRC"),  # Missing curve.
    (b"RGB ", b"\xffGB "),  # Invalid text.
  ],
)
def test_damaged_profiles_are_ignored(damage):
  icc = icc_profile(ADOBE, 2.2).replace(*damage)
  content = encoded(Image.new("RGB", (2, 2), (200, 30, 30)), icc)
  assert first_pixel(content).tolist() == [200, 30, 30]


def test_only_the_center_of_a_narrow_strip_is_resized(monkeypatch):
  image = Image.fromarray(
    np.linspace(0, 255, 3 * 600).reshape(600, 1, 3).astype(np.uint8)
  )
  resize = image_files.Resize(16, "crop", 0.8)
  expected = np.asarray(resize(image)).astype(int)
  monkeypatch.setattr(untrusted_image, "MAX_PIXELS", 1000)
  monkeypatch.setattr(
    Image.Image, "crop", lambda *_: pytest.fail("all of it was resized")
  )
  assert np.abs(np.asarray(resize(image)) - expected).max() <= 2
