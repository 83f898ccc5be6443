"""Uses of private names of libraries, each with its reason.

tests/runtime/test_compat.py fails if a library changes one of them. Libraries
are imported where they are needed.
"""

from collections.abc import Iterator
import contextlib
import logging
import threading
from typing import Any

_MAX_RETRIES = 2
_TIMEOUT = (10, 20)  # Seconds to connect, and between two pieces of a file.


@contextlib.contextmanager
def tfds_download_timeouts() -> Iterator[None]:
  """Make tfds' downloads fail within half a minute without a connection.

  tfds has no option for it: it retries for 3.5 minutes without a network, and
  far longer if packets are dropped. Its threads would also keep an interrupted
  process alive until their downloads end.
  """
  from tensorflow_datasets.core.download import downloader

  max_retries, open_url = downloader.MAX_RETRIES, downloader._open_url
  ended = threading.Event()

  @contextlib.contextmanager
  def open_with_timeout(url, **kwargs):
    with open_url(url, timeout=_TIMEOUT, **kwargs) as (response, blocks):
      yield response, until_ended(blocks)

  def until_ended(blocks):
    for block in blocks:
      if ended.is_set():
        raise InterruptedError
      yield block

  # Hide warnings of each retry, from threads that may outlive this context.
  logging.getLogger("urllib3").setLevel(logging.ERROR)
  downloader.MAX_RETRIES = _MAX_RETRIES
  downloader._open_url = open_with_timeout
  try:
    yield
  finally:
    ended.set()
    downloader.MAX_RETRIES, downloader._open_url = max_retries, open_url


@contextlib.contextmanager
def tfds_expected_file(builder: Any, url: str, info: Any) -> Iterator[None]:
  """Make tfds expect a file with another `UrlInfo`, a checksum, at a URL.

  tfds accepts a file instead of a download only if its checksum is the
  published one, and has no option to change that. The dictionary is shared by
  all builders of the dataset in this process.
  """
  official = builder.url_infos[url]
  builder.url_infos[url] = info
  try:
    yield
  finally:
    builder.url_infos[url] = official


def distributed_state() -> Any:
  """Return JAX's distributed state.

  Its client has the key-value store of the processes; the public API has none.
  `jax.process_index` would start the devices.
  """
  from jax._src import distributed

  return distributed.global_state


def is_out_of_memory(error: Exception) -> bool:
  """Return whether a `JaxRuntimeError` says that a device lacks memory.

  XLA's status code is only part of the message; on a CPU it may be INTERNAL.
  """
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


def is_abandoned_write(error: BaseException | None) -> bool:
  """Return whether an error comes from an abandoned TensorStore write.

  It follows an error in another thread, which is raised.
  """
  return str(error) == "Event loop is closed"
