"""Sets of norms for tests that compile one program per norm."""

import pytest

from rescalevit_jax.models import norms

# Same structure as Derf with another function or parameter;
# tests/models/test_norms.py covers these.
LIKE_DYT = ("ISRU", "DyISRU", "HardTanh", "Arctan", "Softsign", "Linear")
DIFFERENT = tuple(name for name in norms.NORMS if name not in LIKE_DYT)


def most_slow(*usual: str) -> list:
  """Return `DIFFERENT` as parameters, with the uncommon norms marked slow."""
  return [
    pytest.param(name, marks=[] if name in usual else [pytest.mark.slow])
    for name in DIFFERENT
  ]
