"""`python -m rescalevit_jax.sweep`: see `command_line`."""

import gc
import sys

gc.disable()  # Imports leave no garbage; collections would take 0.7 s.

from rescalevit_jax.sweep import command_line

gc.freeze()
gc.enable()
sys.exit(command_line.main(sys.argv[1:]))
