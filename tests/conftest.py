"""Fixtures shared by test modules: the prepared digits and tiny runs."""

import fcntl
import logging
import os
import pathlib
import signal

import fast_compilation
import jax
import program_cache
import pytest
import rare_gc
import small_run

from rescalevit_jax.data import dataset
from rescalevit_jax.data import resident
from rescalevit_jax.training import train

# A shell that starts pytest in the background makes it ignore these signals,
# but some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
  parser.addoption(
    "--slow",
    action="store_true",
    help="also run the tests marked slow, and let XLA optimize as it does for"
    " users",
  )


def pytest_configure(config):
  """Configure XLA in each worker before anything is compiled."""
  rare_gc.switch_on()
  if os.environ.get("JAX_PLATFORMS") == "cpu" and not config.option.slow:
    fast_compilation.switch_on()


def pytest_collection_modifyitems(config, items):
  if config.option.slow:
    return
  for item in items:
    if item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory, worker_id) -> pathlib.Path:
  """Return a folder that all workers of a test session share."""
  base = tmp_path_factory.getbasetemp()
  return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def compile_cache(shared_dir):
  """Share compiled programs among all tests and workers."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.devices()  # Before a test hides the CUDA plugin.
  jax.config.update("jax_compilation_cache_dir", str(shared_dir / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def package_log():
  """Restore the package logger after a test.

  Commands send it to stderr, which caplog does not see and pytest closes.
  """
  log = logging.getLogger("rescalevit_jax")
  handlers, level, propagate = log.handlers, log.level, log.propagate
  yield
  log.handlers, log.propagate = handlers, propagate
  log.setLevel(level)


@pytest.fixture(scope="session")
def digits_dir(shared_dir) -> pathlib.Path:
  """Return a tfds data_dir that contains the prepared `digits`."""
  path = shared_dir / "tfds"
  # Subprocesses inherit it.
  os.environ["XDG_CACHE_HOME"] = str(shared_dir / "cache")
  with open(shared_dir / "tfds.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    dataset.load("digits", str(path))
  return path


@pytest.fixture(scope="session")
def tiny_run(digits_dir, shared_dir) -> pathlib.Path:
  """Return the folder of a finished run; tests must not change it.

  Its images are resized from 8 to 12 pixels. It has two blocks.
  """
  with open(shared_dir / "tiny_run.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    workdir = shared_dir / "tiny_run"
    config = small_run.config(digits_dir)
    config.image_size = 12
    config.model.num_layers = 2
    train.train_and_evaluate(config, workdir)
  return workdir


@pytest.fixture(scope="session")
def default_run(digits_dir, shared_dir) -> pathlib.Path:
  """Return the folder of a finished run of `tiny_config`; do not change it."""
  with open(shared_dir / "default_run.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    workdir = shared_dir / "default_run"
    train.train_and_evaluate(small_run.config(digits_dir), workdir)
  return workdir


@pytest.fixture(scope="session")
def test_digits(digits_dir) -> resident.Split:
  """Return the test split of the digits."""
  return dataset.load("digits", str(digits_dir)).test


@pytest.fixture
def shared_programs():
  """Share compiled programs among the runs of a test."""
  with program_cache.shared():
    yield


@pytest.fixture
def tiny_config(digits_dir):
  """Return the config of a run on the digits that takes one second."""
  return small_run.config(digits_dir)


@pytest.fixture(scope="module")
def module_config(digits_dir):
  """Return `tiny_config` for fixtures with module scope."""
  return small_run.config(digits_dir)
