"""`python -m rescalevit_jax.report`: see `command_line`."""

import sys

from rescalevit_jax.report import command_line

sys.exit(command_line.main())
