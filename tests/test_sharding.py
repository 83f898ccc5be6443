"""Many devices give the numbers of one."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax import sharding


@pytest.mark.parametrize("norm", ["LN", "BN", "GN", "Rescale"])
def test_eight_devices_train_as_one(norm, digits_dir, tmp_path):
  script = pathlib.Path(__file__).parent / "eight_devices.py"
  done = subprocess.run(
    [sys.executable, script, norm, tmp_path, digits_dir],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    },
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith("equal\n")


def test_put_places_whole_arrays_and_parts():
  mesh = sharding.create_mesh()
  x = np.arange(6, dtype=np.int32).reshape(2, 3)
  tree = sharding.put({"a": x}, sharding.replicated(mesh))
  assert tree["a"].sharding.is_fully_replicated
  np.testing.assert_array_equal(tree["a"], x)
  y = np.zeros((4, mesh.size * 2))
  part = sharding.put(y, sharding.split(mesh, axis=1))
  assert part.addressable_shards[0].data.shape == (4, 2)


@pytest.mark.skipif(jax.device_count() != 1, reason="needs one device")
def test_any_batch_suits_one_device():
  sharding.check_batch(7, 7, sharding.create_mesh())


def test_batch_must_divide_by_devices_and_micro_batches():
  class Eight:
    size = 8

  sharding.check_batch(48, 3, Eight())
  with pytest.raises(errors.UserError, match=r"batch is 48.*accum_steps \(4\)"):
    sharding.check_batch(48, 4, Eight())
  with pytest.raises(errors.UserError, match="batch is 12.*8 devices"):
    sharding.check_batch(12, 1, Eight())
