"""Published checkpoints are downloaded once, resumed and verified."""

import base64
import hashlib
import http.server
import threading

import pytest

from rescalevit_jax import errors
from rescalevit_jax.pretrained import published

CONTENT = bytes(range(256)) * 8192  # 2 MiB.


class Server(http.server.BaseHTTPRequestHandler):
  """Serves one file with ranges; class attributes select faults."""

  cut_after = None  # Bytes before the first connection breaks.
  checksum = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
  ranges = states_size = True
  requests: list = []

  def do_GET(self):
    kind = type(self)
    kind.requests.append((self.path, self.headers.get("Range")))
    if "unknown" in self.path:
      self.send_error(404)
      return
    first = 0
    if kind.ranges and (given := self.headers.get("Range")):
      first = int(given.removeprefix("bytes=").removesuffix("-"))
      if first >= len(CONTENT):
        self.send_error(416)
        return
    body = CONTENT[first:]
    self.send_response(206 if first else 200)
    if kind.states_size:
      self.send_header("Content-Length", str(len(body)))
    self.send_header("x-goog-hash", f"crc32c=AAAAAA==, md5={kind.checksum}")
    self.end_headers()
    if kind.cut_after is not None:
      body, kind.cut_after = body[: kind.cut_after], None
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch, tmp_path):
  kind = type("Fresh", (Server,), {"requests": []})
  with http.server.ThreadingHTTPServer(("localhost", 0), kind) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://localhost:{running.server_port}"
    monkeypatch.setattr(published, "BUCKET", url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield kind
    running.shutdown()


def content(path):
  with open(path, "rb") as f:
    return f.read()


def test_a_published_checkpoint_is_downloaded_once(server):
  first = published.find("ViT-B_16")
  assert first.endswith("weights/ViT-B_16.npz")
  assert content(first) == CONTENT
  assert published.find("ViT-B_16") == first
  assert server.requests == [("/imagenet21k/ViT-B_16.npz", None)]


def test_a_checkpoint_of_the_augreg_table_is_downloaded(server):
  path = published.find("augreg/B_16-i21k-300ep-lr_0.001-aug_medium1")
  assert content(path) == CONTENT
  ((url, _),) = server.requests
  assert url == "/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1.npz"


def test_a_broken_download_is_resumed(server):
  server.cut_after = 1_000_000
  with pytest.raises(errors.UserError, match="cannot be downloaded"):
    published.find("ViT-B_16")
  assert content(published.find("ViT-B_16")) == CONTENT
  first = int(server.requests[1][1].removeprefix("bytes=").removesuffix("-"))
  assert 900_000 < first <= 1_000_000


def test_a_server_without_ranges_sends_the_whole_file(server):
  server.cut_after, server.ranges = 1_000_000, False
  with pytest.raises(errors.UserError):
    published.find("ViT-B_16")
  assert content(published.find("ViT-B_16")) == CONTENT


def test_a_partial_file_that_is_too_long_is_dropped(server, tmp_path):
  part = tmp_path / "cache/rescalevit_jax/weights/ViT-B_16.part"
  part.parent.mkdir(parents=True)
  part.write_bytes(CONTENT + b"more")
  with pytest.raises(errors.UserError, match="start again"):
    published.find("ViT-B_16")
  assert content(published.find("ViT-B_16")) == CONTENT


def test_a_wrong_checksum_is_an_error(server, tmp_path):
  server.checksum = "AAAAAAAAAAAAAAAAAAAAAA=="
  with pytest.raises(errors.UserError, match="checksum"):
    published.find("ViT-B_16")
  assert not list(tmp_path.rglob("*.npz")) + list(tmp_path.rglob("*.part"))


def test_a_server_that_does_not_state_the_size_is_an_error(server):
  server.states_size = False
  with pytest.raises(errors.UserError, match="does not state its size"):
    published.find("ViT-B_16")


def test_errors_name_the_url_and_the_path(server, monkeypatch, tmp_path):
  with pytest.raises(errors.UserError, match="HTTP 404") as caught:
    published.find("augreg/unknown")
  place = tmp_path / "cache/rescalevit_jax/weights/augreg/unknown.npz"
  assert str(place) in str(caught.value)
  monkeypatch.setattr(published, "BUCKET", "http://localhost:9")
  with pytest.raises(errors.UserError, match="no connection") as caught:
    published.find("ViT-L_16")
  assert "http://localhost:9/imagenet21k/ViT-L_16.npz" in str(caught.value)


def test_existing_files_are_not_downloaded(server, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert published.find("a/ViT-B_16.npz") == "a/ViT-B_16.npz"
  (tmp_path / "ViT-B_16").touch()
  assert published.find("ViT-B_16") == "ViT-B_16"
  assert server.requests == []
