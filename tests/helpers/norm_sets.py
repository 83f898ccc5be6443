"""Sets of norms, for tests that compile a program for each one."""

from rescalevit_jax.models import norms

# They differ from Derf by the function or the parameter only, which
# tests/models/test_norms.py tests.
LIKE_DYT = ("ISRU", "DyISRU", "HardTanh", "Arctan", "Softsign", "Linear")
DIFFERENT = tuple(name for name in norms.NORMS if name not in LIKE_DYT)
