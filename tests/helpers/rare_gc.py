"""Make Python search for reference cycles rarely, which saves time.

Tracing creates many objects and few cycles.
"""

import gc

CODE = "import gc\ngc.set_threshold(50_000, 10, 4)\n"


def switch_on() -> None:
  """Set the thresholds for this process; ignore its present objects."""
  gc.freeze()
  exec(CODE, {})
