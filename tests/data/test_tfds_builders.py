import http.server
import os
import threading
import time

import fake_data
import pytest

from rescalevit_jax import errors
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.runtime import tensorflow_cpu


def open_error(name, data_dir=None):
  with pytest.raises(errors.UserError) as info:
    tfds_builders.open_builder(name, data_dir)
  assert "\n" not in str(info.value)
  return str(info.value)


def prepare_error(builder):
  with pytest.raises(errors.UserError) as info:
    tfds_builders.prepare(builder)
  message = str(info.value)
  assert "\n" not in message
  assert len(message) < 700
  assert not tfds_builders.is_prepared(builder)
  return message


class TestOpen:
  @pytest.mark.parametrize("name", ["cifar1", "CIFAR10", "cifar-10"])
  def test_unknown_name_gets_a_hint(self, name):
    message = open_error(name)
    assert f"unknown dataset {name!r}" in message
    assert "did you mean cifar10" in message
    assert len(message) < 300

  def test_hints_include_all_tfds_datasets(self):
    assert "did you mean mnist" in open_error("MNIST3")

  @pytest.mark.parametrize("name", ["", "../x", "no such", "a:b", "zzz/1"])
  def test_invalid_name_is_an_error(self, name):
    message = open_error(name)
    assert f"unknown dataset {name!r}" in message
    assert "cifar10, cifar100, digits" in message

  def test_unknown_version_or_config_is_an_error(self):
    assert "9.9.9" in open_error("digits:9.9.9")
    assert "no_config" in open_error("mnist/no_config")

  def test_home_is_expanded(self, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    builder = tfds_builders.open_builder("digits", "~/data")
    assert builder.data_dir == str(tmp_path / "data" / "digits" / "1.0.0")

  def test_a_folder_without_its_description_is_damaged(self, tmp_path):
    folder = tmp_path / "digits" / "1.0.0"
    folder.mkdir(parents=True)
    message = open_error("digits", str(tmp_path))
    assert str(folder) in message
    assert "remove this folder" in message

  @pytest.mark.parametrize("content", ["", "{", "hello"])
  def test_a_damaged_description_is_an_error(self, tmp_path, content):
    folder = tmp_path / "digits" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(content)
    message = open_error("digits", str(tmp_path))
    assert "dataset_info.json is damaged" in message


class TestPrepare:
  def test_preparing_again_is_a_no_op(self, tmp_path, capsys):
    builder = tfds_builders.open_builder("fake", str(tmp_path))
    assert not tfds_builders.is_prepared(builder)
    tfds_builders.prepare(builder)
    assert tfds_builders.is_prepared(builder)
    capsys.readouterr()
    tfds_builders.prepare(builder)
    assert capsys.readouterr() == ("", "")

  def test_failure_leaves_no_files(self, tmp_path):
    builder = tfds_builders.open_builder("fake_broken", str(tmp_path))
    assert "first line second line" in prepare_error(builder)
    assert os.listdir(tmp_path) == []

  def test_interruption_leaves_no_files(self, tmp_path, monkeypatch):
    def example(self, split, i):
      raise KeyboardInterrupt

    monkeypatch.setattr(fake_data.FakeBroken, "example", example)
    builder = tfds_builders.open_builder("fake_broken", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
      tfds_builders.prepare(builder)
    assert os.listdir(tmp_path) == []

  def test_unwritable_folder_is_an_error(self, tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "x")
    message = prepare_error(tfds_builders.open_builder("fake", path))
    assert path in message
    assert "Not a directory" in message

  def test_another_process_may_finish_first(self, tmp_path, monkeypatch):
    original = fake_data.Fake.example

    def example(self, split, i):
      if split == "test" and i == 0:
        monkeypatch.setattr(fake_data.Fake, "example", original)
        tfds_builders.prepare(tfds_builders.open_builder("fake", str(tmp_path)))
      return original(self, split, i)

    monkeypatch.setattr(fake_data.Fake, "example", example)
    builder = tfds_builders.open_builder("fake", str(tmp_path))
    tfds_builders.prepare(builder)
    assert tfds_builders.is_prepared(builder)
    assert sorted(os.listdir(tmp_path / "fake")) == ["1.2.3"]

  def test_missing_tensorflow_is_an_error(self, tmp_path, monkeypatch):
    def load():
      raise errors.UserError("pip install tensorflow-cpu")

    monkeypatch.setattr(tensorflow_cpu, "load", load)
    message = prepare_error(
      tfds_builders.open_builder("cifar10", str(tmp_path))
    )
    assert "cifar10 cannot be prepared" in message
    assert "pip install tensorflow-cpu" in message


class FakeDownload(fake_data.Fake):
  """Downloads its images; the URL is set by the test."""

  URL = ""
  MORE = ()

  def _split_generators(self, dl_manager):
    path, *_ = dl_manager.download([self.URL, *self.MORE])
    assert len(path.read_bytes()) == Handler.SIZE
    return super()._split_generators(dl_manager)


class Handler(http.server.BaseHTTPRequestHandler):
  """Sends a file, a part of it, or an error."""

  SIZE = 300_000
  answer = "whole"
  endless_ended = threading.Event()

  def do_GET(self):
    if "endless" in self.path:
      self.send_endlessly()
    elif self.answer == "error":
      self.send_error(404)
    else:
      self.send_response(200)
      self.send_header("Content-Length", str(self.SIZE))
      self.end_headers()
      self.wfile.write(bytes(self.SIZE // (2 if self.answer == "half" else 1)))

  def send_endlessly(self):
    self.send_response(200)
    self.end_headers()
    try:
      while True:
        self.wfile.write(bytes(10_000))
        time.sleep(0.01)
    except OSError:
      self.endless_ended.set()

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  """Serve the files of FakeDownload."""
  try:
    tensorflow_cpu.load()  # Downloads of tfds need it.
  except errors.UserError as e:
    pytest.skip(str(e))
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{found.server_port}/images.bin"
    monkeypatch.setattr(FakeDownload, "URL", url)
    yield found
    found.shutdown()
    thread.join()


class TestDownload:
  @pytest.mark.parametrize("answer", ["half", "error"])
  def test_failed_download_can_be_repeated(
    self, server, tmp_path, monkeypatch, answer
  ):
    monkeypatch.setattr(Handler, "answer", answer)
    builder = tfds_builders.open_builder("fake_download", str(tmp_path))
    message = prepare_error(builder)
    assert "fake_download: cannot be downloaded" in message
    assert "prepare it elsewhere" in message
    assert str(tmp_path / "fake_download") in message
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Handler, "answer", "whole")
    tfds_builders.prepare(builder)
    assert tfds_builders.is_prepared(builder)

  def test_first_failure_stops_other_downloads(
    self, server, tmp_path, monkeypatch
  ):
    # Otherwise Python waits for their threads at exit.
    monkeypatch.setattr(Handler, "answer", "error")
    monkeypatch.setattr(FakeDownload, "MORE", [f"{FakeDownload.URL}.endless"])
    prepare_error(tfds_builders.open_builder("fake_download", str(tmp_path)))
    assert Handler.endless_ended.wait(timeout=10)

  def test_no_connection_fails_soon(self, server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    builder = tfds_builders.open_builder("fake_download", str(tmp_path))
    start = time.monotonic()
    message = prepare_error(builder)
    assert time.monotonic() - start < 20
    assert f"no connection to {FakeDownload.URL}" in message
    assert os.listdir(tmp_path) == []

  @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
  def test_cifar_without_internet_names_the_script(
    self, server, tmp_path, monkeypatch, name
  ):
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
      monkeypatch.setenv(variable, "http://127.0.0.1:9")
    builder = tfds_builders.open_builder(name, str(tmp_path))
    start = time.monotonic()
    message = prepare_error(builder)
    assert time.monotonic() - start < 20
    archive = name.replace("cifar", "cifar-") + "-binary.tar.gz"
    assert f"rescalevit_jax.data.prepare --archive {archive}" in message
    assert os.listdir(tmp_path) == []
