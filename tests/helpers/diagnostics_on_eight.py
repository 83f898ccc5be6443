"""Compare diagnostics on one and eight devices, for test_sharding.py.

Usage: python diagnostics_on_eight.py DATA_DIR, with
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import sys

import jax
from jax.sharding import Mesh
import numpy as np
import small_run

from rescalevit_jax.distributed import sharding
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import experiment as experiment_lib


def main(data_dir):
  assert jax.device_count() == 8
  config = small_run.config(data_dir)
  sharding._MIN_SPLIT = 100  # Elements; the model is small.
  found = []
  for devices in (1, 8):
    config.sharding.fsdp = devices == 8
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    sharding.create_mesh = lambda mesh=mesh: mesh
    experiment = experiment_lib.create(config)
    state = experiment.init_state()
    programs = diagnostics.CompiledDiagnostics(experiment)
    feed, places = experiment.train_loader, experiment.train_indices
    with feed.batches(places, range(1, 2)) as batches:
      measured, params = programs.before_step(state, *next(batches))
    whole = [x.sharding.is_fully_replicated for x in jax.tree.leaves(params)]
    assert all(whole) == (devices == 1)
    double = jax.tree.map(lambda x: 2 * x, params)
    measured |= programs.after_step(params, double)
    found.append(jax.device_get(measured))
  one, eight = found
  assert one.keys() == eight.keys()
  for name, x in one.items():
    np.testing.assert_allclose(x, eight[name], 1e-4, 1e-6, err_msg=name)
  print("equal")


if __name__ == "__main__":
  main(*sys.argv[1:])
