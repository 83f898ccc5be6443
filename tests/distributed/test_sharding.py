"""Training on many devices gives the results of one device."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import paths
import pytest

from rescalevit_jax import errors
from rescalevit_jax.distributed import sharding


@pytest.mark.parametrize(
  "norm, recipe",
  [
    pytest.param("GN", "", marks=pytest.mark.slow),
    pytest.param("Rescale", "", marks=pytest.mark.slow),
    pytest.param("Cal", "", marks=pytest.mark.slow),
    ("BN", "sgd"),
    pytest.param("LN", "muon", marks=pytest.mark.slow),
    pytest.param("BN", "float16", marks=pytest.mark.slow),
  ],
)
def test_eight_devices_train_like_one(norm, recipe, digits_dir, tmp_path):
  script = paths.HELPERS / "eight_devices.py"
  done = run_on_eight_devices(script, norm, recipe, tmp_path, digits_dir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith("equal\n")


@pytest.mark.slow
def test_eight_devices_measure_diagnostics_like_one(digits_dir):
  script = paths.HELPERS / "diagnostics_on_eight.py"
  done = run_on_eight_devices(script, digits_dir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith("equal\n")


def run_on_eight_devices(*command):
  devices = "--xla_force_host_platform_device_count=8"
  return subprocess.run(
    [sys.executable, *command],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}",
    },
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )


@functools.cache
def collectives(fsdp, digits_dir):
  script = paths.HELPERS / "collectives.py"
  done = run_on_eight_devices(script, fsdp, digits_dir)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_step_only_all_reduces_gradients(digits_dir):
  found = dict(collectives("0", digits_dir))
  (shapes,) = found.pop("all-reduce")
  sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]
  # All gradients and the loss; the class token shares its gradient with its
  # position.
  cls = found.pop("cls")
  assert sum(sizes) == found.pop("parameters") - cls + 1
  del found["held"], found["sizes"]
  assert not any(found.values())


def test_fsdp_gathers_parameters_and_no_activations(digits_dir):
  found = collectives("1", digits_dir)
  assert found["all-gather"]
  for shape in itertools.chain(*found["all-gather"]):
    assert math.prod(map(int, shape.split(","))) in found["sizes"]
  assert not found["all-to-all"] and not found["collective-permute"]
  whole = collectives("0", digits_dir)["held"]
  assert found["held"] < 0.2 * whole  # Parameters and momenta.


@pytest.mark.parametrize(
  "shape, fsdp, expected",
  [
    ((1024, 4096), True, (None, "data")),
    ((4096, 1024), True, ("data",)),
    ((1023, 64), True, (None, "data")),
    ((1023, 65), True, ()),
    ((4096,), True, ()),  # Too small to shard.
    ((), True, ()),
    ((1024, 4096), False, ()),
  ],
)
def test_fsdp_shards_large_arrays(shape, fsdp, expected):
  mesh = jax.sharding.AbstractMesh((8,), ("data",))
  array = jax.ShapeDtypeStruct(shape, np.float32)
  assert sharding.create(array, mesh, fsdp).spec == jax.P(*expected)


def test_put_replicates_or_splits_arrays():
  mesh = sharding.create_mesh()
  x = np.arange(6, dtype=np.int32).reshape(2, 3)
  tree = sharding.put({"a": x}, sharding.replicated(mesh))
  assert tree["a"].sharding.is_fully_replicated
  np.testing.assert_array_equal(tree["a"], x)
  y = np.zeros((4, mesh.size * 2))
  part = sharding.put(y, sharding.split(mesh, axis=1))
  assert part.addressable_shards[0].data.shape == (4, 2)


@pytest.mark.skipif(jax.device_count() != 1, reason="needs one device")
def test_one_device_accepts_any_batch():
  sharding.check_batch(7, 7, sharding.create_mesh())


def test_batch_must_divide_by_devices_and_micro_batches():
  class Eight:
    size = 8

  sharding.check_batch(48, 3, Eight())
  with pytest.raises(errors.UserError, match=r"batch is 48.*accum_steps \(4\)"):
    sharding.check_batch(48, 4, Eight())
  with pytest.raises(errors.UserError, match="batch is 12.*8 devices"):
    sharding.check_batch(12, 1, Eight())
