"""`python -m rescalevit_jax.sweep`: see `command_line`."""

import sys

from rescalevit_jax.sweep import command_line

sys.exit(command_line.main(sys.argv[1:]))
