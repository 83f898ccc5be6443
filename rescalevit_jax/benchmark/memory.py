"""Measure the device memory of compiled programs."""

import jax


def used(compiled: jax.stages.Compiled) -> int:
  """Return the peak on the first device, or `needed` if not measured."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use", needed(compiled))


def needed(compiled: jax.stages.Compiled) -> int:
  """Return the bytes of arguments, results and temporaries on one device."""
  found = compiled.memory_analysis()
  assert found is not None  # Of the backends cpu and cuda.
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
  )
