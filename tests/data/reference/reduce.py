"""Create the reduced set of reference numbers that is part of the repository.

Read `../shared/parity` beside the checkout and write `*.xz` files beside this
script, with the same names and keys but without the largest arrays. All
weights, the JSON files and Google's checkpoints are complete. The output is
reproducible for one version of liblzma.

    python tests/data/reference/reduce.py
"""

import io
import lzma
import pathlib
import re
import struct
import sys
import zipfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
FULL = HERE.parents[3] / "shared" / "parity"
LIMIT = 2_000_000  # Total bytes.

# Number of training batches kept. Twelve cover both phases of Rescale; BN has
# three recorded passes.
BATCHES = {"LN.npz": 3, "BN.npz": 3, "GN.npz": 3, "Rescale.npz": 12}
# The run whose final weights are kept; it uses clipping and weight decay.
FINAL_RUN = "extra"
# Larger arrays of gradients and final weights are omitted.
LONGEST = 400
# Long schedules keep every 100th learning rate and NaN elsewhere, which
# preserves shapes.
STRIDE = 100


def keep(file: str, key: str, array: np.ndarray) -> np.ndarray | None:
  """Return the part of an array to keep, or None."""
  if file in BATCHES:
    return _keep_norm(BATCHES[file], key, array)
  if file == "lr_schedule.npz":
    if key.startswith("info_"):
      return None
    if len(array) == 20000:
      kept = np.full_like(array, np.nan)
      kept[::STRIDE], kept[-1] = array[::STRIDE], array[-1]
      return kept
  if file == "posembed_resize.npz" and key.startswith(("torch", "info")):
    return None  # torch_original/* equals google/* bit for bit.
  if file in ("google_ref.npz", "google_prelogits_ref.npz"):
    if key.startswith("timm"):
      return None
    if key == "images_resized" or key.endswith(
      ("/resized_features", "/resized_probe_logits")
    ):
      return array[:2]
  return array


def _keep_norm(batches, key, array):
  if not key.startswith("ref/"):
    return array
  if key in ("ref/train/images", "ref/train/labels"):
    return array[:batches]
  if key in ("ref/eval/embed", "ref/eval/encoded"):
    return array[:1]
  if key == "ref/eval/tokens":
    return array[:, :1]
  if key == "ref/eval/attn":
    return array[:2]
  if "grads" in key or "/final/" in key:
    final_of_other_run = "/final/" in key and (
      batches < 12 or f"/{FINAL_RUN}/" not in key
    )
    if final_of_other_run or array.size > LONGEST:
      return None
  if batches < 12 and re.fullmatch(r"ref/train/.*/eval_logits", key):
    return None
  return array


def pack(arrays: dict[str, np.ndarray]) -> bytes:
  """Return an uncompressed `.npz` whose arrays start at multiples of 64."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
    for key, array in arrays.items():
      info = zipfile.ZipInfo(f"{key}.npy")  # The date is 1980, for equal bytes.
      pad = -(buffer.tell() + 30 + len(info.filename) + 4) % 64
      info.extra = struct.pack("<HH", 0xD935, pad) + bytes(pad)
      with archive.open(info, "w") as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)
  return buffer.getvalue()


def compress(content: bytes, word: bool) -> bytes:
  """Compress to xz; set `word` if the content is mostly 4-byte numbers."""
  positions = {"lc": 0, "lp": 2} if word else {"lc": 3, "lp": 0}
  filters = [
    {
      "id": lzma.FILTER_LZMA2,
      "preset": 9 | lzma.PRESET_EXTREME,
      **positions,
    }
  ]
  return lzma.compress(content, filters=filters)


def main() -> None:
  if not FULL.is_dir():
    sys.exit(f"{FULL}: there are no full reference numbers to reduce")
  total = 0
  for source in sorted([*FULL.glob("*.npz"), *FULL.glob("*.json")]):
    if source.suffix == ".json":
      content = compress(source.read_bytes(), word=False)
    else:
      with np.load(source, allow_pickle=False) as full:
        kept = {k: keep(source.name, k, full[k]) for k in full}
      kept = {k: v for k, v in kept.items() if v is not None}
      content = compress(pack(kept), word=True)
    (HERE / f"{source.name}.xz").write_bytes(content)
    total += len(content)
    print(f"{source.name:28} {len(content):9,} bytes")
  print(f"{'all':28} {total:9,} bytes")
  if total > LIMIT:
    sys.exit(f"more than {LIMIT:,} bytes: keep less")


if __name__ == "__main__":
  main()
