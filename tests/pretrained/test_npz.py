"""Checkpoint files: names, types, damage and writing."""

import io
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import parity
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import untrusted_npz


@pytest.mark.parametrize("numbering", ["old", "new"])
@pytest.mark.parametrize(
  "prefix",
  ["", "params/", "opt/target/", "optimizer/target/", "a/b/"],
)
def test_prefixes_and_numberings_are_normalized(numbering, prefix, tmp_path):
  saved = trees.arrays()

  def rename(key):
    if numbering == "new":
      for old, new in trees.NEW_NUMBERING.items():
        key = key.replace(old, new)
    return prefix + key

  path = trees.write(tmp_path, {rename(k): v for k, v in saved.items()})
  params, stats, report = load.load(path, *trees.fresh(seed=1))
  trees.same(trees.flat(params, stats), saved)
  assert set(report.loaded) == saved.keys()
  assert not report.dropped


def test_one_key_in_both_numberings_is_an_error(tmp_path):
  arrays = trees.arrays()
  key = trees.BLOCK + "MlpBlock_3/Dense_0/bias"
  new = key.replace("MlpBlock_3", "MlpBlock_0")
  trees.refuses(
    trees.write(tmp_path, arrays | {new: arrays[key]}), key, new, "twice"
  )


@pytest.mark.parametrize(
  "prefix, state",
  [
    ("params/", "opt/0/mu/"),
    ("opt/target/", "opt/state/"),
    ("weights/", "state/x"),
  ],
)
def test_arrays_outside_the_prefix_are_dropped(prefix, state, tmp_path):
  saved = trees.arrays("BN")
  params = {
    k if k in trees.stats_keys(saved) else prefix + k: v
    for k, v in saved.items()
  }
  optimizer = {state + k: v for k, v in trees.arrays("LN", seed=2).items()}
  optimizer["step"] = np.array("never looked at")
  path = trees.write(tmp_path, optimizer | params)
  *loaded, report = load.load(path, *trees.fresh("BN", seed=1))
  trees.same(trees.flat(*loaded), saved)
  assert set(report.dropped) == optimizer.keys()


def test_several_models_in_a_file_are_refused(tmp_path):
  arrays = trees.arrays()
  both = {p + k: v for p in ("a/", "b/") for k, v in arrays.items()}
  trees.refuses(trees.write(tmp_path, both), "several models", "a/", "b/")


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_float_types_become_float32(dtype, tmp_path):
  saved = {k: v.astype(dtype) for k, v in trees.arrays().items()}
  params, stats, _ = load.load(
    trees.write(tmp_path, saved), *trees.fresh(seed=1)
  )
  trees.same(
    trees.flat(params, stats), {k: v.astype("f4") for k, v in saved.items()}
  )


def test_bfloat16_is_converted(tmp_path):
  saved = {k: v.astype(ml_dtypes.bfloat16) for k, v in trees.arrays().items()}
  path = trees.write(tmp_path, saved)
  assert np.load(path)["cls"].dtype == "V2"
  params, stats, _ = load.load(path, *trees.fresh(seed=1))
  trees.same(
    trees.flat(params, stats), {k: v.astype("f4") for k, v in saved.items()}
  )


# Files that are not checkpoints.


def corrupt(path):
  """Change values of one array without changing the archive."""
  data = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as z:
    start = z.getinfo("cls.npy").header_offset
  data[start + 200] ^= 0xFF
  path.write_bytes(data)


def test_missing_file_is_refused(tmp_path):
  trees.refuses(tmp_path / "no.npz", "no such file", "give the path")


def test_folder_is_refused(tmp_path):
  trees.refuses(tmp_path, "folder")


@pytest.mark.parametrize(
  "content, part",
  [
    (b"", "empty"),
    (b"<html>404</html>", "not a zip archive"),
    (b"PK\x03\x04 and no more", "truncated"),
    (b"\x80\x04K\x01.", "not a zip archive"),
    (b"PK\x05\x06" + bytes(18), "not"),
  ],
)
def test_other_content_is_refused(content, part, tmp_path):
  path = tmp_path / "a.npz"
  path.write_bytes(content)
  trees.refuses(path, part)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused(kept, tmp_path):
  path = trees.write(tmp_path, trees.arrays())
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * kept)])
  trees.refuses(path, "truncated")


def test_missing_bytes_are_detected(tmp_path):
  path = trees.write(tmp_path, trees.arrays())
  data = path.read_bytes()
  path.write_bytes(data[:3000] + data[4000:])
  trees.refuses(path)


def test_npy_file_named_npz_is_refused(tmp_path):
  with open(tmp_path / "a.npz", "wb") as f:
    np.save(f, np.ones(3))
  trees.refuses(tmp_path / "a.npz", ".npy")


def test_pickled_arrays_are_not_loaded(tmp_path):
  arrays = trees.arrays() | {"cls": np.array([{"a": 1}], object)}
  trees.refuses(trees.write(tmp_path, arrays), "cls", "cannot be read")


def test_damaged_array_is_named(tmp_path):
  path = trees.write(tmp_path, trees.arrays())
  corrupt(path)
  trees.refuses(path, "cls", "cannot be read")


def test_member_that_is_not_an_array_is_named(tmp_path):
  path = trees.write(tmp_path, trees.arrays())
  with zipfile.ZipFile(path, "a") as z:
    z.writestr("note.npy", b"hello")
  trees.refuses(path, "note", "not an array")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_array_is_refused(tmp_path):
  path = trees.write(tmp_path, trees.arrays())
  with zipfile.ZipFile(path, "a") as z:
    z.writestr("cls.npy", z.read("cls.npy"))
  trees.refuses(path, "several arrays have the name cls")


def test_other_archives_are_refused(tmp_path):
  trees.refuses(
    trees.write(tmp_path, {"x": np.ones(3)}), "not a ViT checkpoint", "x"
  )
  trees.refuses(trees.write(tmp_path, {}), "not a ViT checkpoint")
  with zipfile.ZipFile(tmp_path / "torch.npz", "w") as z:
    z.writestr("archive/data.pkl", b"\x80\x02.")
  trees.refuses(tmp_path / "torch.npz", "not a ViT checkpoint", "data.pkl")


# Hostile files; tests/fuzz has more.


def claim(shape, dtype="<f4"):
  """Return the start of an .npy file of this shape."""
  file = io.BytesIO()
  header = {"shape": shape, "fortran_order": False, "descr": dtype}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue()


def add(path, content, name="cls.npy", method=zipfile.ZIP_DEFLATED):
  """Replace or add a member."""
  arrays = trees.arrays()
  arrays.pop(name.removesuffix(".npy"), None)
  trees.write(path.parent, arrays, path.name)
  with zipfile.ZipFile(path, "a", method) as z:
    z.writestr(name, content)


@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((2**40,), "<f4"),
    ((2**62, 4), "<f4"),
    ((2**32, 2**32), "<f4"),
    ((-1,), "<f4"),
    ((1,), "<f2147483647"),
    ((1,), "<f4"),  # Extra bytes.
  ],
)
def test_false_array_size_does_not_allocate_memory(shape, dtype, tmp_path):
  content = claim(shape, dtype) + bytes(32)
  add(tmp_path / "a.npz", content)
  tracemalloc.start()
  try:
    trees.refuses(tmp_path / "a.npz", "cls cannot be read")
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(untrusted_npz, "SLACK", 1 << 20)
  add(tmp_path / "a.npz", claim((1 << 24,)) + bytes(1 << 26), "head/x.npy")
  assert (tmp_path / "a.npz").stat().st_size < 1 << 17
  tracemalloc.start()
  try:
    trees.refuses(tmp_path / "a.npz", "head/x exceeds the limit", "0.0 GiB")
    with pytest.raises(errors.UserError, match="head/x exceeds the limit"):
      npz_model.load(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()


def test_total_size_of_small_arrays_is_limited(tmp_path, monkeypatch):
  monkeypatch.setattr(untrusted_npz, "SLACK", 1 << 16)
  arrays = trees.arrays()
  arrays |= {f"head/{i}": np.zeros(1 << 10, "f4") for i in range(100)}
  trees.refuses(trees.write(tmp_path, arrays), "exceeds the limit")
  # Conversion multiplies its size by four.
  arrays = trees.arrays() | {"head/x": np.zeros(1 << 15, "f2")}
  trees.refuses(trees.write(tmp_path, arrays), "exceeds the limit")


def test_a_larger_head_is_within_the_limit(tmp_path):
  saved = trees.arrays(num_classes=21_843)
  saved = {k: v.astype("f8") for k, v in saved.items()}
  *_, report = load.load(trees.write(tmp_path, saved), *trees.fresh(seed=1))
  assert set(report.reinitialized) == trees.HEAD


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_methods_are_refused(method, tmp_path):
  add(tmp_path / "a.npz", claim((8,)) + bytes(32), method=method)
  trees.refuses(tmp_path / "a.npz", "cls", "compression method")


def test_long_array_header_is_refused(tmp_path):
  header = b"\x93NUMPY\2\0\xff\xff\xff\x7f" + bytes(100)
  add(tmp_path / "a.npz", header)
  trees.refuses(tmp_path / "a.npz", "cls", "version (2, 0)")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 300])
def test_invalid_array_names(name, tmp_path):
  add(tmp_path / "a.npz", b"", name)
  assert len(trees.refuses(tmp_path / "a.npz", "not a valid array name")) < 400


def test_size_of_the_member_list_is_limited(tmp_path, monkeypatch):
  monkeypatch.setattr(untrusted_npz, "_MAX_READ", 1 << 16)
  arrays = {f"opt/{i}": np.zeros(1) for i in range(2000)}
  path = trees.write(tmp_path, trees.arrays() | arrays)
  trees.refuses(path, "list of members")


def test_huge_layer_index_does_not_create_layers(tmp_path):
  arrays = trees.arrays()
  key = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"
  arrays[key.replace("_1/", "_999999999/")] = arrays.pop(key)
  path = trees.write(tmp_path, arrays)
  trees.refuses(path, key)
  with pytest.raises(errors.UserError, match="complete Vision Transformer"):
    npz_model.load(path)


# Writing.


def test_saved_names_match_the_published_files(tmp_path):
  trees_like_google = trees.fresh(num_classes=10, image_size=32, **trees.SMALL)
  npz.save(tmp_path / "a.npz", *trees_like_google)
  with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
    assert {k: v.shape for k, v in saved.items()} == {
      k: v.shape for k, v in parity.arrays("google.npz").items()
    }


def test_save_replaces_the_file(tmp_path):
  path = tmp_path / "weights"  # No suffix is added.
  for seed in (0, 1):
    npz.save(path, *trees.fresh(seed=seed))
  assert [p.name for p in tmp_path.iterdir()] == ["weights"]
  params, stats, _ = load.load(path, *trees.fresh(seed=2))
  trees.same(trees.flat(params, stats), trees.arrays(seed=1))


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  npz.save(path, *trees.fresh())
  before = path.read_bytes()

  def full(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  with pytest.raises(errors.UserError, match="a.npz.*No space left"):
    npz.save(path, *trees.fresh(seed=1))
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", "no/such/folder/a.npz"])
def test_save_to_an_invalid_path_is_an_error(path, tmp_path):
  with pytest.raises(errors.UserError, match="cannot be written") as caught:
    npz.save(tmp_path / path, *trees.fresh())
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())
