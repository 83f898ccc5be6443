"""`python -m rescalevit_jax.sweep`: see `command_line`."""

import sys

from rescalevit_jax.runtime import fast_imports

fast_imports.begin()

from rescalevit_jax.sweep import command_line

fast_imports.end()
sys.exit(command_line.main(sys.argv[1:]))
