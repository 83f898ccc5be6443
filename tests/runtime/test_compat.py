"""The private names of libraries that compat uses exist and work."""

import asyncio
import inspect
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from rescalevit_jax.runtime import compat


def test_tfds_opens_urls_by_the_replaced_names():
  assert isinstance(downloader.MAX_RETRIES, int)
  parameters = inspect.signature(downloader._open_url).parameters
  assert [*parameters] == ["url", "kwargs"]
  download = downloader._Downloader._sync_download
  assert "_open_url" in download.__code__.co_names
  connect = downloader._open_with_requests.__wrapped__
  assert "MAX_RETRIES" in connect.__code__.co_names


def test_tfds_names_are_replaced_and_restored():
  before = downloader.MAX_RETRIES, downloader._open_url
  with compat.tfds_download_timeouts():
    assert downloader.MAX_RETRIES < before[0]
    assert downloader._open_url is not before[1]
  assert before == (downloader.MAX_RETRIES, downloader._open_url)


def test_tfds_builders_share_the_expected_files(tmp_path):
  first, second = (tfds.builder("cifar10", data_dir=tmp_path) for _ in "ab")
  (url,) = first.url_infos
  official = first.url_infos[url]
  other = tfds.download.checksums.UrlInfo(size=1, checksum="0", filename="a")
  with compat.tfds_expected_file(first, url, other):
    assert second.url_infos[url] == other
  assert second.url_infos[url] == official


JOIN = """
import sys
import jax
from rescalevit_jax.runtime import compat
assert compat.distributed_state().client is None
jax.distributed.initialize(sys.argv[1], 1, 0)
state = compat.distributed_state()
assert (state.process_id, state.num_processes) == (0, 1)
assert state.coordinator_address == sys.argv[1]
state.client.key_value_set("folder/0", "old")
state.client.key_value_set("folder/0", "new", allow_overwrite=True)
assert state.client.key_value_dir_get("folder") == [("folder/0", "new")]
"""


def test_the_distributed_client_has_a_key_value_store():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  subprocess.run([sys.executable, "-c", JOIN, address], check=True, timeout=60)


def test_out_of_memory_is_recognized():
  with pytest.raises(jax.errors.JaxRuntimeError) as e:
    jnp.zeros(2**45).block_until_ready()
  assert compat.is_out_of_memory(e.value)
  assert not compat.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL"))


def test_a_closed_event_loop_is_recognized():
  loop = asyncio.new_event_loop()
  loop.close()
  with pytest.raises(RuntimeError) as e:
    loop.call_soon(print)
  assert compat.is_abandoned_write(e.value)
  assert not compat.is_abandoned_write(None)
