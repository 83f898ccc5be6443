"""`python -m rescalevit_jax.benchmark`: see `speed`."""

import sys

from rescalevit_jax.benchmark import speed

if __name__ == "__main__":
  sys.exit(speed.main())
