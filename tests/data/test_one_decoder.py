"""Training, evaluation and prediction decode files identically."""

import io

import fake_data
import numpy as np
from PIL import Image
import pytest

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import image_files
from rescalevit_jax.data import untrusted_image

MODES = (
  "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV I I;16 I;16B F".split()
)
# Lower bound on the formats and modes that Pillow writes.
LEAST_WRITTEN = 45


def picture(mode, edge=16):
  """Draw a gradient with a transparent corner, in any mode."""
  ramp = np.linspace(0, 255, edge * edge).reshape(edge, edge)
  if mode in ("I", "I;16", "I;16B"):
    wide = np.round(ramp * 257).astype(np.uint16)
    if mode == "I":
      return Image.fromarray(wide.astype(np.int32))
    order = ">u2" if mode.endswith("B") else "<u2"
    return Image.frombytes(mode, (edge, edge), wide.astype(order).tobytes())
  if mode == "F":
    return Image.fromarray(ramp.astype(np.float32))
  levels = np.round(ramp).astype(np.uint8)
  rgba = np.stack([levels, levels.T, 255 - levels, np.full_like(levels, 255)])
  rgba[3, :4, :4] = 0
  image = Image.fromarray(rgba.transpose(1, 2, 0))
  if mode in ("La", "RGBa"):
    return image.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
  return image.convert("RGB").convert(mode) if mode in (
    "CMYK", "YCbCr", "HSV", "RGBX"
  ) else image.convert("P" if mode == "PA" else mode).convert(mode)  # fmt: skip


def written():
  """Yield format, mode and content of every file type that Pillow writes."""
  for kind in untrusted_image.supported_formats():
    for mode in MODES:
      image = picture(mode)
      file = io.BytesIO()
      try:
        image.save(file, kind)
      except Exception:
        continue  # Pillow does not write this pair.
      yield kind, mode, file.getvalue()


WRITTEN = list(written())


def test_pillow_writes_enough_formats():
  assert len(WRITTEN) >= LEAST_WRITTEN, len(WRITTEN)
  assert {kind for kind, _, _ in WRITTEN} >= {"BMP", "GIF", "JPEG", "PNG"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


def in_folder(content, suffix, root):
  """Create a folder dataset with a file in two classes."""
  for name in ("a", "b"):
    (root / name).mkdir(parents=True)
    (root / name / f"x{suffix}").write_bytes(content)
  return f"folder:{root}"


@pytest.mark.parametrize("resize", [{}, {"image_size": 9}])
@pytest.mark.parametrize(
  "kind, mode, content", WRITTEN, ids=[f"{k}-{m}" for k, m, _ in WRITTEN]
)
def test_training_evaluation_and_prediction_agree(
  kind, mode, content, resize, tmp_path
):
  suffix = f".{kind.lower()}"
  name = in_folder(content, suffix, tmp_path / "set")
  path = tmp_path / "set" / "a" / f"x{suffix}"
  try:
    expected = image_files.Resize(**resize)(image_files.read(path))
  except errors.UserError:
    # Training and evaluation must refuse it, too.
    with pytest.raises(errors.UserError, match=path.name):
      dataset_lib.load(name, None, num_val=1, source="resident", **resize)
    return
  expected = np.asarray(expected)
  for source in ("resident", "streaming"):
    found = dataset_lib.load(name, None, num_val=1, source=source, **resize)
    np.testing.assert_array_equal(found.train.images[0], expected)
    np.testing.assert_array_equal(found.test.images[0], expected)
  size = expected.shape[0]
  seen = image_files.model_input(path, size, image_files.Resize(**resize))
  np.testing.assert_allclose((seen + 1) * 127.5, expected, atol=1e-4)


class FakeEncoded(fake_data.Fake):
  """Stores encoded files in tfds records."""

  SHAPE = (None, None, 3)
  COUNTS = {"train": len(WRITTEN), "test": len(WRITTEN)}

  def example(self, split, i):
    return {"image": io.BytesIO(WRITTEN[i][2]), "label": i % 4, "id": str(i)}


def test_tfds_records_are_decoded_like_files(tmp_path):
  readable = []
  for _, _, content in WRITTEN:
    try:
      readable.append(image_files.decode(content, image_files.Resize(9)))
    except Exception:
      continue  # Refused; see above.
  found = dataset_lib.load(
    "fake_encoded", str(tmp_path), image_size=9, skip_damaged=True
  )
  assert len(found.train) == len(readable)
  assert found.num_skipped == len(WRITTEN) - len(readable)
  # tfds shuffles examples.
  expected = sorted(image.tobytes() for image in readable)
  assert sorted(image.tobytes() for image in found.train.images) == expected


def test_sixteen_bit_grays_keep_their_levels(tmp_path):
  """A plain conversion would clip values above 255 of 65535 to white."""
  (content,) = (c for k, m, c in WRITTEN if (k, m) == ("PNG", "I;16"))
  name = in_folder(content, ".png", tmp_path / "set")
  image = dataset_lib.load(name, None, num_val=1).train.images[0]
  assert len(np.unique(image)) > 200


def test_transparent_pixels_are_white(tmp_path):
  (content,) = (c for k, m, c in WRITTEN if (k, m) == ("PNG", "RGBA"))
  name = in_folder(content, ".png", tmp_path / "set")
  image = dataset_lib.load(name, None, num_val=1).train.images[0]
  assert (image[:4, :4] == 255).all() and not (image == 255).all()


def test_a_color_profile_is_applied(tmp_path):
  """A file whose red and green are swapped by its profile's primaries."""
  from PIL import ImageCms

  wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
  image = Image.new("RGB", (4, 4), (200, 10, 10))
  path = tmp_path / "a.png"
  image.save(path, icc_profile=wide)
  # A profile of another color space is ignored.
  assert np.asarray(image_files.read(path))[0, 0].tolist() == [200, 10, 10]
  image.save(path, icc_profile=b"damaged")
  assert np.asarray(image_files.read(path))[0, 0].tolist() == [200, 10, 10]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 57)])
def test_center_crop_equals_torchvisions(size):
  """Evaluation resizes the short side to 16 / 0.8, then takes the center."""
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
  found = image_files.Resize(16, "crop", 0.8)(image)
  short = 20
  width, height = (short * edge // min(size) for edge in size)
  resized = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - 16) / 2), round((height - 16) / 2)
  expected = resized.crop((left, top, left + 16, top + 16))
  assert found.size == (16, 16)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
