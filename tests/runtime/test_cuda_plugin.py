"""The CUDA plugin compiles without a GPU and leaves other programs alone."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import pytest
import tiny_gpu

from rescalevit_jax import errors
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.runtime import cuda_plugin


def run(code, **environment):
  environment = {**os.environ, **environment}
  if environment.get("JAX_PLATFORMS") == "":
    del environment["JAX_PLATFORMS"]
  return subprocess.run(
    [sys.executable, "-c", code],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@tiny_gpu.needs_compiler
@pytest.mark.skipif(
  os.path.exists("/dev/nvidiactl"), reason="there is a GPU to be found"
)
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_programs_run_on_the_cpu_without_warnings(platforms):
  done = run(
    "from rescalevit_jax.runtime import cli\n"
    "import jax\n"
    "cli.run(lambda: print(jax.default_backend()))",
    JAX_PLATFORMS=platforms,
  )
  assert (done.stdout, done.stderr) == ("cpu\n", "")


@tiny_gpu.needs_compiler
def test_a_hidden_plugin_still_compiles():
  done = run(
    "from rescalevit_jax.runtime import cuda_plugin\n"
    "from rescalevit_jax.benchmark import gpus\n"
    "import jax\n"
    "cuda_plugin.hide_if_compile_only()\n"
    "jax.config.update('jax_platforms', 'cpu')\n"
    "text = gpus.get('h100').description\n"
    "devices = cuda_plugin.compile_only_devices(text, 2)\n"
    "print([d.compute_capability for d in devices], jax.devices())",
    JAX_PLATFORMS="",
  )
  assert done.stdout.startswith("['9.0', '9.0'] [CpuDevice"), done.stderr


@pytest.mark.parametrize("name", gpus.NAMES)
@tiny_gpu.needs_compiler
def test_xla_accepts_every_gpu_description(name):
  """A second compilation does not use the disk cache."""
  gpu = gpus.get(name)
  (device,) = cuda_plugin.compile_only_devices(gpu.description, 1)
  assert device.compute_capability == ".".join(map(str, gpu.capability))
  assert device.device_kind == gpu.title
  x = jax.ShapeDtypeStruct(
    (8,), "float32", sharding=SingleDeviceSharding(device)
  )
  with warnings.catch_warnings(), cuda_plugin.without_cache():
    warnings.simplefilter("error")
    for _ in range(2):
      jax.clear_caches()
      program = jax.jit(jnp.sin).lower(x)
      compiled = program.compile(cuda_plugin.compiler_options())
      text = compiled.as_text()
  assert "fusion(" in text


def test_missing_wheels_are_named(monkeypatch):
  monkeypatch.setattr(cuda_plugin, "can_compile", lambda: False)
  with pytest.raises(errors.UserError) as e:
    cuda_plugin.compile_only_devices("", 1)
  assert str(e.value) == (
    "--compile_for: the compiler for GPUs is not installed; run"
    f" pip install jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
  )
