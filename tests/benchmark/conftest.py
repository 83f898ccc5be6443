"""Fixture that compiles programs for absent GPUs once for all tests."""

import fcntl
import json

import pytest
import tiny_gpu

from rescalevit_jax.benchmark import hlo


@pytest.fixture(scope="session")
def compile_tiny(shared_dir):
  """Return a function from (program, GPU, devices, keys) to an `hlo.Program`.

  The program also has `text`, `launches` and `needed`, the memory in bytes. All
  workers share compiled programs.
  """
  if not tiny_gpu.CAN_COMPILE:
    pytest.skip(tiny_gpu.REASON)
  folder = shared_dir / "gpu_programs"
  folder.mkdir(exist_ok=True)
  found = {}

  def compile_tiny(what, gpu="h100", devices=1, step=None, **keys):
    name = f"{what}-{gpu}-{devices}-{step}-" + "-".join(
      f"{k}={v}" for k, v in sorted(keys.items())
    )
    if name not in found:
      with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / f"{name}.json"
        if not path.exists():
          path.write_text(
            json.dumps(tiny_gpu.compile(what, gpu, devices, step, keys))
          )
      text, needed, launches = json.loads(path.read_text())
      found[name] = hlo.read(text)
      found[name].text, found[name].needed = text, needed
      found[name].launches = launches
    return found[name]

  return compile_tiny
