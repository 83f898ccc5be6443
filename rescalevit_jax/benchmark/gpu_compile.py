"""Compile training and evaluation for absent GPUs.

The programs equal those compiled on such a GPU, except for autotuning: the
algorithms of cuBLAS and cuDNN and the tiling of Triton's kernels.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import peers
from rescalevit_jax.data import image_files
from rescalevit_jax.data import stored
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.runtime import cuda_plugin
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment as experiment_lib

# Autotuning needs a GPU. Without Triton, products are calls of cuBLAS.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Inputs(NamedTuple):
  """Properties of a dataset that a program depends on."""

  shape: tuple[int, int, int]  # Of a stored image, (H, W, 3).
  num_classes: int


class Program(NamedTuple):
  """A compiled program."""

  compiled: jax.stages.Compiled
  launches: int | None  # None if XLA has not listed its thunks.


def inputs_of(config: ml_collections.ConfigDict) -> Inputs:
  """Return the inputs of a config's dataset, which need not be prepared.

  Raises:
    UserError: the dataset is unknown or unsuitable.
  """
  shape, class_names = stored.describe(
    config.dataset,
    config.tfds_data_dir,
    image_files.Resize(config.data.image_size),
  )
  return Inputs(shape, len(class_names))


def train_step(
  config: ml_collections.ConfigDict,
  gpu: gpus.Gpu,
  inputs: Inputs,
  devices: int = 1,
  step: int | None = None,
) -> Program:
  """Compile a run's training step.

  Args:
    config: a valid config.
    gpu: the GPU.
    inputs: inputs of the config's dataset.
    devices: number of GPUs on one host, which share the batch.
    step: number of the step, as a norm may calibrate in step 1; None for the
      last step.

  Raises:
    UserError: the compiler's wheels are missing, or the config does not fit the
      GPU.
  """
  with _compiling_for(gpu, devices) as mesh:
    sharding.check_batch(config.batch, config.accum_steps, mesh)
    experiment = experiment_lib.build(config, mesh, inputs.num_classes)
    micro_batch = (config.accum_steps, config.batch // config.accum_steps)
    return _compile(
      experiment.train_step(step or config.total_steps),
      experiment.abstract_state(),
      *_batch(micro_batch, inputs.shape, sharding.split(mesh, axis=1)),
      np.uint32(0),
    )


def eval_step(
  config: ml_collections.ConfigDict,
  gpu: gpus.Gpu,
  inputs: Inputs,
  devices: int = 1,
) -> Program:
  """Compile the evaluation of a batch; see `train_step`."""
  with _compiling_for(gpu, devices) as mesh:
    experiment = experiment_lib.build(config, mesh, inputs.num_classes)
    state, by_device = experiment.abstract_state(), sharding.split(mesh)
    batch = (-(-config.batch_eval // devices) * devices,)
    return _compile(
      evaluate.compiled_step(experiment.model, config.image_size, mesh),
      state.params,
      state.batch_stats,
      *_batch(batch, inputs.shape, by_device),
      jax.ShapeDtypeStruct(batch, np.bool_, sharding=by_device),
    )


def flax_train_step(
  config: ml_collections.ConfigDict, gpu: gpus.Gpu, devices: int = 1
) -> Program:
  """Compile the step of `peers.FlaxPeer`; see `train_step`."""
  with _compiling_for(gpu, devices) as mesh:
    everywhere, by_device = sharding.replicated(mesh), sharding.split(mesh)
    size = config.image_size
    shape = (config.batch, size, size, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32, sharding=by_device)
    labels = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=by_device)
    recipe = peers.FlaxRecipe(config)
    state, key = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(recipe.init, images),
    )
    return _compile(recipe.train_step, state, key, images, labels)


@contextlib.contextmanager
def _compiling_for(gpu: gpus.Gpu, devices: int) -> Iterator[Mesh]:
  """Trace for a GPU; yield a mesh of absent devices."""
  found = cuda_plugin.compile_only_devices(gpu.description, devices)
  with accelerator.compiling_for(gpu.accelerator), cuda_plugin.without_cache():
    yield Mesh(np.asarray(found), ("data",))


def _compile(step: Any, *arguments: Any) -> Program:
  with tempfile.TemporaryDirectory() as folder:
    options = {**_OPTIONS, **cuda_plugin.compiler_options()}
    options["xla_dump_to"] = folder
    compiled = step.lower(*arguments).compile(compiler_options=options)
    paths = list(pathlib.Path(folder).glob("*.thunk_sequence_after_*.txt"))
    launches = count_launches(paths[0].read_text("utf-8")) if paths else None
  return Program(compiled, launches)


def count_launches(thunks: str) -> int:
  """Count CUDA graphs, and kernels outside of them, in XLA's list of thunks.

  The body of a loop counts once.
  """
  count, graph = 0, None
  for line in thunks.splitlines():
    match = re.match(r"( *)\d+: (\w+)", line)
    if match is None or (graph is not None and len(match[1]) > graph):
      continue  # Kernels of a graph are indented.
    graph = len(match[1]) if match[2] == "kCommandBuffer" else None
    count += match[2] not in ("kWhile", "kAsyncDone")
  return count


def _batch(batch, shape, by_device):
  return (
    jax.ShapeDtypeStruct((*batch, *shape), np.uint8, sharding=by_device),
    jax.ShapeDtypeStruct(batch, np.int32, sharding=by_device),
  )
