"""Sets of norms, for tests that compile a program for each one."""

import pytest

from rescalevit_jax.models import norms

# They differ from Derf by the function or the parameter only, which
# tests/models/test_norms.py tests.
LIKE_DYT = ("ISRU", "DyISRU", "HardTanh", "Arctan", "Softsign", "Linear")
DIFFERENT = tuple(name for name in norms.NORMS if name not in LIKE_DYT)


def most_slow(*usual: str) -> list:
  """Return `DIFFERENT` as parameters, all but the usual ones marked slow."""
  return [
    pytest.param(name, marks=[] if name in usual else [pytest.mark.slow])
    for name in DIFFERENT
  ]
