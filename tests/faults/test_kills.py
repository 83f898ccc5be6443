"""A killed run goes on to the same result; `kills.py` does this at length."""

import random

import kills
import pytest


@pytest.mark.parametrize("norm, accum_steps", kills.KINDS[:2])
def test_kills_change_nothing(digits_dir, tmp_path, norm, accum_steps):
  rng = random.Random(accum_steps)
  killer = kills.Killer(tmp_path, digits_dir, norm, accum_steps, rng)
  assert len(killer.kill(4)) == 4
