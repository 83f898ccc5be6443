"""tfds builders: finding one by its name, preparing its files."""

from collections.abc import Iterator
import contextlib
import difflib
import logging
import os
import re
import shutil
import threading
import traceback
import urllib.error

from google.protobuf import json_format
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager
from tensorflow_datasets.core.download import downloader

from rescalevit_jax import errors
from rescalevit_jax.data import digits
from rescalevit_jax.runtime import tensorflow_cpu

# What this project is about, named first in hints; tfds has hundreds.
NAMES = ("cifar10", "cifar100", digits.Digits.name)

_NETWORK_ERRORS = (
  requests.RequestException,
  urllib.error.URLError,
  tfds.download.DownloadError,
  download_manager.NonMatchingChecksumError,
)
_RETRIES = 2
_TIMEOUT = (10, 20)  # Seconds to connect, and between two pieces of a file.


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the builder of a data set, prepared or not.

  Args:
    name: as tfds has it: 'cifar10', 'imagenet_resized/32x32'.
    data_dir: where prepared data sets lie; None for tfds' own place.

  Raises:
    UserError: there is no such data set, or its folder is damaged.
  """
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except Exception as e:  # tfds raises all sorts.
    known = tfds.list_builders(with_community_datasets=False)
    if re.split("[/:]", name)[0] in known:
      message = f"cannot open data set {name!r}: {_reason(e)}"
      if isinstance(e, json_format.ParseError):
        message += "; its dataset_info.json is damaged: remove its folder"
      raise errors.UserError(message) from e
    close = difflib.get_close_matches(name.lower(), known, n=3)
    valid = dict.fromkeys((*close, *NAMES))
    raise errors.UserError(
      f"unknown data set {name!r}: {errors.nearest(name.lower(), valid)}, or"
      " any other image classification data set of tfds"
    ) from e
  if os.path.exists(builder.data_dir) and not is_prepared(builder):
    raise errors.UserError(
      f"{builder.data_dir}: damaged, dataset_info.json is missing; remove"
      " this folder to prepare the data set anew"
    )
  return builder


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Returns whether a data set's files are there."""
  # The builder's own method warns where they are not.
  return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


def prepare(
  builder: tfds.core.DatasetBuilder,
  download_dir: str | None = None,
  manual_dir: str | None = None,
) -> None:
  """Downloads a data set and writes its files (array_record), if need be.

  Args:
    builder: of `open_builder`.
    download_dir: for downloads and what is extracted from them; None for tfds'
      own place.
    manual_dir: folder in which tfds finds files that it need not download; None
      for tfds' own place.

  Raises:
    UserError: this cannot be done: no internet, no TensorFlow, no space, no
      permission, or tfds' reason. The data set is then not prepared at all.
  """
  if is_prepared(builder):
    return
  try:
    with _tidy(builder), _impatient():
      if getattr(builder, "NEEDS_TENSORFLOW", True):
        tensorflow_cpu.load()
      builder.download_and_prepare(
        download_dir=download_dir,
        download_config=tfds.download.DownloadConfig(
          manual_dir=manual_dir, try_download_gcs=False
        ),
        file_format="array_record",
      )
  except Exception as e:  # tfds raises all sorts.
    # Ends its progress bars, which would come after the error's line.
    traceback.clear_frames(e.__traceback__)
    if is_prepared(builder):  # Another process was faster.
      return
    message = f"cannot prepare {builder.name} in {builder.data_dir_root}: "
    if isinstance(e, _NETWORK_ERRORS):
      message = f"cannot download {builder.name}: "
    raise errors.UserError(message + _reason(e) + _advice(builder, e)) from e


def archive_names(builder: tfds.core.DatasetBuilder) -> dict[str, str]:
  """Returns {file name: URL} of what tfds downloads for a data set."""
  infos = builder.url_infos or {}
  return {info.filename: url for url, info in infos.items() if info.filename}


def _advice(builder, error):
  if not isinstance(error, _NETWORK_ERRORS):
    return ""
  archives = list(archive_names(builder))
  if builder.name in NAMES and archives:
    return (
      "; without internet: python -m rescalevit_jax.data.prepare --archive"
      f" {archives[0]}"
    )
  return (
    "; without internet: prepare it elsewhere and copy its folder to"
    f" {os.path.dirname(builder.data_dir)}"
  )


def _reason(error):
  """Returns an exception's message as one line of moderate length."""
  if isinstance(error, requests.RequestException):
    url = getattr(error.request, "url", None)
    return f"no connection to {url}" if url else "the connection broke off"
  if isinstance(error, OSError) and error.strerror:
    where = f": {error.filename}" if error.filename else ""
    return error.strerror + where
  return errors.brief(error)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
  """Makes tfds give up after half a minute without a connection.

  By itself it tries for 3.5 minutes where there is no network, and far longer
  where packets are dropped. Nor would its threads end before their downloads,
  keeping an interrupted process.
  """
  retries, open_url = downloader.MAX_RETRIES, downloader._open_url
  ended = threading.Event()

  @contextlib.contextmanager
  def open_impatiently(url, **kwargs):
    with open_url(url, timeout=_TIMEOUT, **kwargs) as (response, blocks):
      yield response, until_ended(blocks)

  def until_ended(blocks):
    for block in blocks:
      if ended.is_set():
        raise InterruptedError
      yield block

  # Warns of each retry, in threads that may outlive this function.
  logging.getLogger("urllib3").setLevel(logging.ERROR)
  downloader.MAX_RETRIES = _RETRIES
  downloader._open_url = open_impatiently
  try:
    yield
  finally:
    ended.set()
    downloader.MAX_RETRIES, downloader._open_url = retries, open_url


@contextlib.contextmanager
def _tidy(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
  """Removes unfinished downloads and empty folders after a failure."""
  root = builder.data_dir_root
  downloads = root / "downloads"

  def unfinished():
    return set((downloads / builder.name).glob("*.tmp.*"))

  before = unfinished()
  try:
    yield
  except BaseException:
    for path in unfinished() - before:
      shutil.rmtree(path, ignore_errors=True)
    for path in (
      root / builder.name,
      downloads / builder.name,
      downloads / "extracted",
      downloads,
    ):
      with contextlib.suppress(OSError):  # Not empty, or not there.
        os.rmdir(path)
    raise
