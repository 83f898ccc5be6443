"""Training restarts its process once to set glibc's malloc."""

import os
import platform
import subprocess
import sys

import pytest

from rescalevit_jax.runtime import malloc

SCRIPT = """
import os, sys
print(
  os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True
)  # A restart loses what is buffered.
from rescalevit_jax.runtime import malloc
malloc.restart_with("-c")
print("running")
"""


KEEP_FREED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
ALL = f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:{KEEP_FREED}"


@pytest.mark.parametrize(
  "given, wanted",
  [
    ("", ALL),
    (ALL, ALL),
    (
      "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=2",
      f"glibc.malloc.hugetlb=0:glibc.malloc.arena_max=2:{KEEP_FREED}",
    ),
    ("glibc.malloc.check=3:", f"glibc.malloc.check=3:{ALL}"),
  ],
)
def test_tunables_of_the_user_are_kept(given, wanted):
  found = malloc.environment({"A": "b", "GLIBC_TUNABLES": given})
  assert found == {"A": "b", "GLIBC_TUNABLES": wanted}


def test_malloc_variables_of_the_user_are_kept():
  given = {"MALLOC_ARENA_MAX": "4", "MALLOC_MMAP_MAX_": "9"}
  found = malloc.environment(given)
  names = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1099511627776"
  assert found == {**given, "GLIBC_TUNABLES": names}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux")
def test_a_program_restarts_once_with_the_same_pid():
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, "--x=1 2"],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  first, second, end = done.stdout.splitlines()
  assert first.split()[0] == second.split()[0]
  assert first.split(" ", 1)[1] == "None ['--x=1 2']"
  assert second.split(" ", 1)[1] == f"{ALL} ['--x=1 2']"
  assert end == "running"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux")
def test_a_program_that_drops_the_settings_restarts_once():
  drop = "import os; os.environ.pop('GLIBC_TUNABLES', None)"
  done = subprocess.run(
    [sys.executable, "-c", drop + SCRIPT],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  assert len(done.stdout.splitlines()) == 3  # Two starts, and "running".


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux")
def test_the_training_command_sets_malloc(tmp_path):
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  (tmp_path / "config.py").write_text(
    "import os; print(os.environ['GLIBC_TUNABLES']); raise SystemExit"
  )
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "rescalevit_jax.main",
      f"--config={tmp_path / 'config.py'}",
    ],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.stdout == f"{ALL}\n"


PAGE_FAULTS = """
import resource, jax, jax.numpy as jnp
x, w = jnp.ones((3000, 16)), jnp.ones((16, 7500))
# A thread allocates 90 MB of temporary memory.
f = jax.jit(jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w))))
for i in range(30):
  if i == 20:  # The heap has grown to its final size.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(f(w))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc"
)
def test_memory_of_earlier_calls_is_reused():
  done = subprocess.run(
    [sys.executable, "-c", PAGE_FAULTS],
    env=malloc.environment(
      {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    ),
    capture_output=True,
    text=True,
    check=True,
  )
  # By default 220,000: 10 x 90 MB. One late call may still grow the heap.
  assert int(done.stdout) < 33_000
