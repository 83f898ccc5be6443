"""Tiny training steps, compiled for absent GPUs."""

import os

import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax.benchmark import gpu_compile
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import memory
from rescalevit_jax.runtime import cuda_plugin

CAN_COMPILE = (
  cuda_plugin.can_compile() and os.environ.get("JAX_PLATFORMS") == "cpu"
)
REASON = "needs the extra gpu-compile, and JAX_PLATFORMS=cpu"
needs_compiler = pytest.mark.skipif(not CAN_COMPILE, reason=REASON)

# Resizing images adds a matrix product.
INPUTS = gpu_compile.Inputs((24, 24, 3), 10)
SIZES = {
  "model_name": "ViT-XS_4",
  "image_size": 32,
  "batch": 16,
  "batch_eval": 16,
  "dtype": "bfloat16",
  "model.hidden_size": 64,
  "model.mlp_dim": 128,
  "model.num_heads": 2,
  "model.num_layers": 2,
  # Random masks or crops would double the compile time.
  "model.dropout_rate": 0.0,
  "augment.crop": False,
}


def tiny_config(**changes):
  """Return the config of a step that compiles in seconds."""
  config = config_lib.default()
  config.update_from_flattened_dict({**SIZES, **changes})
  config_lib.validate(config)
  return config


def compile(what, gpu, devices, step, keys):
  """Return a tiny program's optimized HLO, memory in bytes and launches."""
  batch = {"batch": 16 * devices, "batch_eval": 16 * devices}
  config = tiny_config(**{**batch, **keys})
  gpu = gpus.get(gpu)
  if what == "train":
    program = gpu_compile.train_step(config, gpu, INPUTS, devices, step)
  elif what == "eval":
    program = gpu_compile.eval_step(config, gpu, INPUTS, devices)
  else:
    program = gpu_compile.flax_train_step(config, gpu, devices)
  compiled, launches = program
  return compiled.as_text(), memory.needed(compiled), launches
