"""Train on one and on eight devices, for test_sharding.py.

Usage: python eight_devices.py NORM RECIPE FOLDER DATA_DIR, with RECIPE from
recipes.py, or empty for the default recipe, and
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import pathlib
import sys

import flax
import jax
from jax.sharding import Mesh
import numpy as np
import rare_gc
import recipes

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.training import train


def _missing():
  raise errors.UserError("not needed here")


def main(norm, recipe, folder, data_dir):
  rare_gc.switch_on()
  assert jax.device_count() == 8
  config = config_lib.default()
  config.update(
    {
      "dataset": "digits",
      "tfds_data_dir": data_dir,
      "model_name": "ViT-XS_2",
      "image_size": 8,
      "batch": 48,
      "accum_steps": 2,
      "batch_eval": 100,  # The last of 360 images do not fill a batch.
      "total_steps": 10,
      "warmup_steps": 3,
      "eval_every": 10,
      "progress_every": 1,
    }
  )
  config.model.update(
    {
      "norm": norm,
      "patch_size": 4,
      "hidden_size": 16,
      "mlp_dim": 32,
      "num_heads": 2,
      "num_layers": 1,
    }
  )
  config.update_from_flattened_dict(recipes.RECIPES.get(recipe, {}))
  metric_writers.tensorflow_cpu.load = _missing  # Saves time.
  found = {}
  sharding._MIN_SPLIT = 100  # Elements; the model is small.
  for kind in ("one", "eight", "fsdp"):
    workdir = pathlib.Path(folder) / kind
    devices = 1 if kind == "one" else 8
    config.sharding.fsdp = kind == "fsdp"
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    sharding.create_mesh = lambda mesh=mesh: mesh
    train.train_and_evaluate(config, workdir)
    with open(workdir / "metrics.jsonl", encoding="utf-8") as f:
      lines = [json.loads(line) for line in f]
    params, batch_stats, _ = checkpoint.load_variables(workdir, "latest")
    params = flax.traverse_util.flatten_dict(params, sep="/")
    if config.optimizer != "sgd":
      # Softmax cancels the gradient of key biases up to rounding errors,
      # which Adam makes as large as any other.
      params = {k: v for k, v in params.items() if not k.endswith("key/bias")}
    found[kind] = lines, jax.tree.leaves((params, batch_stats))
  lines_1, weights_1 = found.pop("one")
  assert len(lines_1) == 11
  half = config.dtype == "float16"
  for lines_8, weights_8 in found.values():
    for a, b in zip(lines_1, lines_8, strict=True):
      assert a.keys() == b.keys()
      for key in a:
        rtol = 1e-3 if half else 2e-5
        np.testing.assert_allclose(a[key], b[key], rtol=rtol, err_msg=key)
    for a, b in zip(weights_1, weights_8, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4 if half else 2e-6)
  print("equal")


if __name__ == "__main__":
  main(*sys.argv[1:])
