"""Training restarts its process once to enable glibc's huge pages."""

import os
import subprocess
import sys

import pytest

from rescalevit_jax.runtime import huge_pages

SCRIPT = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
from rescalevit_jax.runtime import huge_pages
huge_pages.restart_with("-c")
print("running")
"""


@pytest.mark.parametrize(
  "given, wanted",
  [
    ("", "glibc.malloc.hugetlb=1"),
    (
      "glibc.malloc.arena_max=2",
      "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
    ),
    ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
  ],
)
def test_tunables_of_the_user_are_kept(given, wanted):
  found = huge_pages.environment({"A": "b", "GLIBC_TUNABLES": given})
  assert found == {"A": "b", "GLIBC_TUNABLES": wanted}


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
  assert second.split(" ", 1)[1] == "glibc.malloc.hugetlb=1 ['--x=1 2']"
  assert end == "running"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux")
def test_the_training_command_enables_huge_pages(tmp_path):
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
  assert done.stdout == "glibc.malloc.hugetlb=1\n"
