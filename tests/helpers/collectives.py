"""Count the collectives of a step on eight devices, for test_sharding.py.

Usage: python collectives.py FSDP DATA_DIR, FSDP 0 or 1, with
XLA_FLAGS=--xla_force_host_platform_device_count=8. Print JSON: the
shapes of each kind of collective, the number of parameters, the number of
parameters and momenta on one device, and the parameters' sizes.
"""

import json
import re
import sys

import jax
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax.distributed import sharding
from rescalevit_jax.training import experiment as experiment_lib

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def main(fsdp, data_dir):
  assert jax.device_count() == 8
  config = config_lib.default()
  config.update(
    {
      "dataset": "digits",
      "tfds_data_dir": data_dir,
      "model_name": "ViT-XS_2",
      "image_size": 8,
      "batch": 64,
    }
  )
  config.sharding.fsdp = fsdp == "1"
  sharding._MIN_SPLIT = 1000  # Elements; the model is small.
  experiment = experiment_lib.create(config)
  place = sharding.split(experiment.mesh, axis=1)
  images = jax.ShapeDtypeStruct((1, 64, 8, 8, 3), np.uint8, sharding=place)
  labels = jax.ShapeDtypeStruct((1, 64), np.int32, sharding=place)
  state = experiment.abstract_state()
  compiled = (
    experiment.train_step(1)
    .lower(state, images, labels, np.uint32(0))
    .compile()
  )
  found = {kind: [] for kind in KINDS.split("|")}
  pattern = rf" = (.*?) ({KINDS})(?:-start)?\("
  for shapes, kind in re.findall(pattern, compiled.as_text()):
    found[kind].append(re.findall(r"\[([\d,]*)\]", shapes))
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  held = sum(
    np.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves((state.params, state.opt_state))
  )
  found["parameters"], found["held"] = parameters, int(held)
  found["sizes"] = [x.size for x in jax.tree.leaves(state.params)]
  found["cls"] = state.params["cls"].size
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
