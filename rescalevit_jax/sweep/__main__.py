"""Runs `sweep.main`."""

import sys

from rescalevit_jax import sweep

sys.exit(sweep.main(sys.argv[1:]))
