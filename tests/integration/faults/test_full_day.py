"""Memory and open files stay level; `full_day.py` does this at length."""

import full_day
import pytest
import tiny_sweep


@pytest.mark.slow
def test_a_long_run_takes_no_more_than_a_short_one(
  digits_dir, shared_dir, tmp_path
):
  env = tiny_sweep.environment(shared_dir)
  full_day.watch(tmp_path, digits_dir, 60, env)
