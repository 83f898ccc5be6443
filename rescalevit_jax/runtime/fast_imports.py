"""Import a command's modules without garbage collection.

Imports create many objects and no garbage. Collections would take 0.7 s of
processor time.
"""

import gc


def begin() -> None:
  """Pause garbage collection."""
  gc.disable()


def end() -> None:
  """Resume garbage collection, without the objects that exist now."""
  gc.freeze()
  gc.enable()
