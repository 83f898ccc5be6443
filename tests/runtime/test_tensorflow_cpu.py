import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
before = dict(os.environ)
from rescalevit_jax.runtime import tensorflow_cpu
assert "tensorflow" not in sys.modules
tf = tensorflow_cpu.load()
for name in tensorflow_cpu._QUIET:  # TensorFlow itself sets others.
  assert os.environ.get(name) == before.get(name)
assert tf.config.get_visible_devices("GPU") == []
assert int(tf.constant(1) + 1) == 2
assert tensorflow_cpu.load() is tf
"""


def run(program, **environ):
  return subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.skipif(
  importlib.util.find_spec("tensorflow") is None, reason="no TensorFlow"
)
def test_load_prints_nothing_and_restores_the_process():
  result = run(PROGRAM)
  assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_missing_tensorflow_is_a_user_error(tmp_path):
  (tmp_path / "tensorflow.py").write_text("raise ImportError('not\\nthere')")
  result = run(
    "from rescalevit_jax import errors\n"
    "from rescalevit_jax.runtime import tensorflow_cpu\n"
    "try:\n  tensorflow_cpu.load()\n"
    "except errors.UserError as e:\n  print(e)\n",
    PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
  )
  assert result.stdout == (
    "cannot import TensorFlow (not there); run pip install tensorflow-cpu\n"
  )
