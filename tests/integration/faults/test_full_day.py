"""Memory and open files do not leak; `full_day.py` is a longer test."""

import full_day
import pytest
import tiny_sweep


@pytest.mark.slow
def test_a_long_run_does_not_leak(digits_dir, shared_dir, tmp_path):
  env = tiny_sweep.environment(shared_dir)
  full_day.watch(tmp_path, digits_dir, 60, env)
