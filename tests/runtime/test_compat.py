"""The private names of libraries that compat uses exist and have an effect."""

import inspect

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
