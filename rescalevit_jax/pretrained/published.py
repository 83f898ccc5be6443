"""Published checkpoints, by name: downloaded once into the user's cache.

  ViT-B_16                      Google's ImageNet-21k weights
  augreg/B_16-i21k-300ep-…      a file of the AugReg table, without .npz

Files are in `${XDG_CACHE_HOME:-~/.cache}/rescalevit_jax/weights/`. A broken
download is resumed.
"""

import base64
import hashlib
import logging
import pathlib
import re
import time

import filelock
import requests

from rescalevit_jax import errors
from rescalevit_jax.runtime import cache
from rescalevit_jax.runtime import terminal

_log = logging.getLogger(__name__)

BUCKET = "https://storage.googleapis.com/vit_models"
_NAMES = re.compile(
  r"ViT-(B_8|B_16|B_32|L_16|L_32|H_14)|augreg/[A-Za-z0-9_.+-]+"
)
_TIMEOUT = (10, 30)  # Seconds to connect, and between two pieces.
_PIECE = 1 << 16  # Bytes; an interrupted piece is lost.
_SECONDS_BETWEEN_LINES = 5.0


def is_name(path: str) -> bool:
  """Return whether `pretrained_path` is a name and not an existing file."""
  named = _NAMES.fullmatch(path) and not path.endswith(".npz")
  return bool(named) and not pathlib.Path(path).exists()


def find(path: str) -> str:
  """Return the file of `pretrained_path`; download it if it is a name."""
  if not is_name(path):
    return path
  file = cache.root() / "weights" / f"{path}.npz"
  if file.exists():
    return str(file)
  folder = "" if path.startswith("augreg/") else "imagenet21k/"
  url = f"{BUCKET}/{folder}{path}.npz"
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Other processes wait for the same file.
    with filelock.FileLock(file.with_suffix(".lock")):
      if not file.exists():
        _download(url, file)
  except (requests.RequestException, OSError) as e:
    raise errors.UserError(
      f"{path}: cannot be downloaded from {url} ({_reason(e)}); download it"
      f" elsewhere and put it at {file}"
    ) from e
  return str(file)


def _download(url, file):
  """Download to FILE.part, from where an earlier download stopped."""
  part = file.with_suffix(".part")
  done = part.stat().st_size if part.exists() else 0
  headers = {"Range": f"bytes={done}-"} if done else {}
  with requests.get(url, stream=True, timeout=_TIMEOUT, headers=headers) as r:
    if r.status_code == requests.codes.requested_range_not_satisfiable:
      part.unlink()  # Longer than the file, or complete but not renamed.
      raise requests.RequestException(
        "the partial file does not fit; start again"
      )
    r.raise_for_status()
    if done and r.status_code != requests.codes.partial_content:
      done = 0  # The server sends the whole file.
    if "Content-Length" not in r.headers:
      raise requests.RequestException("the server does not state its size")
    size = done + int(r.headers["Content-Length"])
    _log.info("downloading %s (%.0f MB) to %s", url, size / 1e6, file)
    with open(part, "ab" if done else "wb") as f:
      start = line = time.monotonic()
      first = done
      for piece in r.iter_content(_PIECE):
        f.write(piece)
        done += len(piece)
        now = time.monotonic()
        if now - line > _SECONDS_BETWEEN_LINES:
          line = now
          speed = (done - first) / (now - start)
          left = terminal.duration((size - done) / speed)
          _log.info(
            "%.0f of %.0f MB  %.1f MB/s  ETA %s",
            *(done / 1e6, size / 1e6, speed / 1e6, left),
          )
    md5 = re.search(r"\bmd5=([^, ]+)", r.headers.get("x-goog-hash", ""))
  if done != size:
    raise requests.ConnectionError(f"{done} of {size} bytes arrived")
  if md5:
    with open(part, "rb") as f:
      digest = hashlib.file_digest(f, "md5").digest()
    if base64.b64encode(digest).decode() != md5[1]:
      part.unlink()
      raise requests.RequestException("its checksum is wrong; start again")
  part.replace(file)


def _reason(error):
  if isinstance(error, requests.HTTPError):
    return f"HTTP {error.response.status_code}"
  if isinstance(error, requests.ConnectionError) and error.args:
    if not isinstance(error.args[0], str):
      return "no connection"
  return errors.brief(error)
