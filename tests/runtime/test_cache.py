"""The compilation cache."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from rescalevit_jax.runtime import cache

PROGRAM = """
from rescalevit_jax.runtime import cache
import jax, jax.numpy as jnp
cache._MIN_SECONDS = 0
cache.enable_compilation_cache()
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))))
"""


def run(cache, **env):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env={
      **{k: v for k, v in os.environ.items() if not k.startswith("JAX_")},
      "JAX_PLATFORMS": "cpu",
      "XDG_CACHE_HOME": str(cache),
      **env,
    },
    capture_output=True,
    text=True,
    check=True,
  )


def programs(folder):
  return {
    p: p.stat().st_mtime_ns
    for p in folder.rglob("*")
    if p.name.endswith("cache")
  }


def test_a_second_process_uses_the_cache(tmp_path):
  first = run(tmp_path)
  kept = programs(tmp_path)
  assert kept
  for path in kept:
    (machine,) = path.relative_to(tmp_path / "rescalevit_jax").parts[:-1]
    assert machine.startswith("compiled-")
  second = run(tmp_path)
  assert programs(tmp_path) == kept
  assert first.stdout == second.stdout


def test_an_unwritable_folder_is_not_an_error(tmp_path):
  (tmp_path / "file").write_text("")
  done = run(tmp_path / "file")
  assert "[" in done.stdout and "Traceback" not in done.stderr


def test_jaxs_environment_variable_takes_precedence(tmp_path):
  run(tmp_path / "a", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b"))
  assert not (tmp_path / "a").exists()


def test_each_type_of_cpu_has_a_separate_cache(monkeypatch):
  name = cache._machine()
  assert name == cache._machine()
  read = pathlib.Path.read_text
  monkeypatch.setattr(
    pathlib.Path,
    "read_text",
    lambda self, **kwargs: read(self, **kwargs).replace(
      "flags\t\t:", "flags\t\t: x"
    ),
  )
  if "flags\t\t:" not in read(pathlib.Path("/proc/cpuinfo")):
    pytest.skip("this processor's flags have another name")
  assert cache._machine() != name


def test_an_enabled_cache_is_not_replaced(monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  assert before  # Set by conftest.py.
  cache.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == before
