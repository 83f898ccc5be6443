"""Find a tfds builder by name, and prepare its dataset."""

import contextlib
import difflib
import os
import re
import shutil
import traceback
import urllib.error

from google.protobuf import json_format
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager

from rescalevit_jax import errors
from rescalevit_jax.data import digits
from rescalevit_jax.runtime import compat
from rescalevit_jax.runtime import tensorflow_cpu

# The datasets to suggest first; tfds has hundreds.
NAMES = ("cifar10", "cifar100", digits.Digits.name)

_NETWORK_ERRORS = (
  requests.RequestException,
  urllib.error.URLError,
  tfds.download.DownloadError,
  download_manager.NonMatchingChecksumError,
)


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Return the builder of a dataset of tfds, prepared or not.

  Raises:
    UserError: the dataset is unknown, or its folder is damaged.
  """
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except Exception as e:  # tfds raises many types.
    known = tfds.list_builders(with_community_datasets=False)
    if re.split("[/:]", name)[0] in known:
      message = f"dataset: {name!r} cannot be opened ({_reason(e)})"
      if isinstance(e, json_format.ParseError):
        message += "; its dataset_info.json is damaged, remove its folder"
      raise errors.UserError(message) from e
    close = difflib.get_close_matches(name.lower(), known, n=3)
    valid = dict.fromkeys((*close, *NAMES))
    raise errors.UserError(
      f"dataset: unknown dataset {name!r}, neither in"
      f" {data_dir or '~/tensorflow_datasets'} nor in tfds;"
      f" {errors.nearest(name.lower(), valid)}, or"
      " any other image classification dataset of tfds, or folder:PATH"
    ) from e
  if os.path.exists(builder.data_dir) and not is_prepared(builder):
    raise errors.UserError(
      f"{builder.data_dir}: damaged, dataset_info.json is missing; remove"
      " this folder to prepare the dataset again"
    )
  return builder


def config_names(name: str, data_dir: str | None) -> list[str]:
  """Return the names of a dataset's configs."""
  try:
    configs = tfds.builder_cls(name).builder_configs
  except Exception:  # tfds raises many types; the next line explains.
    configs = {}
    open_builder(name, data_dir)
  return sorted(configs)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Return whether a dataset is prepared."""
  # The builder's own method warns if it is not.
  return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


def prepare(
  builder: tfds.core.DatasetBuilder,
  download_dir: str | None = None,
  manual_dir: str | None = None,
) -> None:
  """Download a dataset and write its files (array_record), if necessary.

  Downloads go to `download_dir`; files of `manual_dir` replace them. A failure
  leaves no half-prepared dataset.
  """
  if is_prepared(builder):
    return
  try:
    with _clean_up_after_failure(builder), compat.tfds_download_timeouts():
      if getattr(builder, "NEEDS_TENSORFLOW", True):
        tensorflow_cpu.load()
      builder.download_and_prepare(
        download_dir=download_dir,
        download_config=tfds.download.DownloadConfig(
          manual_dir=manual_dir, try_download_gcs=False
        ),
        file_format="array_record",
      )
  except Exception as e:  # tfds raises many types.
    # End its progress bars, which would follow the error's line.
    traceback.clear_frames(e.__traceback__)
    if is_prepared(builder):  # By another process in the meantime.
      return
    if isinstance(e, _NETWORK_ERRORS):
      raise errors.UserError(
        f"{builder.name}: cannot be downloaded ({_reason(e)}); without"
        f" internet, {_offline_advice(builder)}"
      ) from e
    raise errors.UserError(
      f"{builder.data_dir_root}: {builder.name} cannot be prepared"
      f" ({_reason(e)}); fix this and start again"
    ) from e


def archive_names(builder: tfds.core.DatasetBuilder) -> dict[str, str]:
  """Return the URLs that tfds downloads for a dataset, by file name."""
  infos = builder.url_infos or {}
  return {info.filename: url for url, info in infos.items() if info.filename}


def _offline_advice(builder):
  archives = list(archive_names(builder))
  if builder.name in NAMES and archives:
    return f"python -m rescalevit_jax.data.prepare --archive {archives[0]}"
  return (
    "prepare it elsewhere and copy its folder to"
    f" {os.path.dirname(builder.data_dir)}"
  )


def _reason(error):
  """Return an exception's message as one line of moderate length."""
  if isinstance(error, requests.RequestException):
    url = getattr(error.request, "url", None)
    return f"no connection to {url}" if url else "the connection broke off"
  if isinstance(error, OSError) and error.strerror:
    where = f": {error.filename}" if error.filename else ""
    return error.strerror + where
  return errors.brief(error)


@contextlib.contextmanager
def _clean_up_after_failure(builder):
  """Remove unfinished downloads and empty folders after a failure."""
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
