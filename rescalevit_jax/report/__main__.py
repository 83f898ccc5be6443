"""`python -m rescalevit_jax.report`: see `command_line`."""

import gc
import sys

gc.disable()  # Imports leave no garbage; collections would take 0.7 s.

from rescalevit_jax.report import command_line

gc.freeze()
gc.enable()
sys.exit(command_line.main())
