"""A killed run resumes to equal results; `kills.py` is a longer test."""

import random

import kills
import pytest
import tiny_sweep


@pytest.mark.parametrize(
  "norm, accum_steps",
  [pytest.param(*kills.KINDS[0], marks=pytest.mark.slow), kills.KINDS[1]],
)
def test_killed_runs_resume_to_equal_results(
  digits_dir, shared_dir, tmp_path, norm, accum_steps
):
  rng = random.Random(accum_steps)
  env = tiny_sweep.environment(shared_dir)
  killer = kills.Killer(tmp_path, digits_dir, norm, accum_steps, rng, env)
  assert len(killer.kill(4)) == 4
