r"""Trains or evaluates a Vision Transformer, with a norm or without one.

  python -m rescalevit_jax.main --config=configs/quickstart.py
  python -m rescalevit_jax.main --config=configs/vit_b16_rescale.py \
      --workdir=runs/a --config.dataset=cifar100 --config.model.norm=BN
  python -m rescalevit_jax.main --workdir=runs/a --mode=eval

The same command again goes on where the run stopped; --workdir alone is enough
for that. Exit code: 0 when finished or stopped by a signal, 1 after an error, 2
for a mistake on the command line. Config keys, set by --config.KEY=VALUE:

"""

import json
import os
import pathlib
import sys
import traceback
from typing import NoReturn

from absl import app
from absl import flags
import ml_collections
from ml_collections import config_flags

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import evaluate
from rescalevit_jax import experiment
from rescalevit_jax import progress
from rescalevit_jax import train

__doc__ += config_lib.describe("  {name} = {default}\n      {meaning}")

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "File with a function get_config(), such as configs/quickstart.py;"
  " default: config.json of --workdir.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; default: runs/ and a name made of data set, model,"
  " norm, scratch or pretrained, and seed.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval"],
  "Train, with evaluations on the way, or only evaluate"
  " (--config.eval_weights says what).",
)


def main(argv: list[str]) -> None:
  """Trains or evaluates, as the flags say."""
  if len(argv) > 1:
    _fail(f"unknown argument {argv[1]!r}: flags begin with --", code=2)
  progress.log_to_stderr()
  try:
    config, workdir = _config_and_workdir()
    if config.deterministic:  # Read when JAX starts the devices, below.
      flag = "--xla_gpu_deterministic_ops=true"
      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    if _MODE.value == "train":
      train.train_and_evaluate(config, workdir)
    else:
      print(json.dumps(evaluate.evaluate_run(config, workdir)))
  except (errors.UserError, OSError) as e:
    _fail(str(e), code=1)
  except KeyboardInterrupt:
    _fail("interrupted before the training began", code=130)


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it or in the config is one line."""
  try:
    nones = {}  # The flags of ml_collections know no None.
    for arg in argv[1:]:
      key, _, value = arg.removeprefix("--config.").partition("=")
      if arg.startswith("--config."):
        config_lib.check_key(key)
        if value == "None":
          nones[key] = None
          argv = [a for a in argv if a != arg]
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.update_from_flattened_dict(nones)
      config_lib.validate(_CONFIG.value)
    elif flags.FLAGS["config"].present:
      raise errors.UserError("--config: get_config() returns None")
    return rest
  except Exception as e:  # get_config() may raise anything.
    where = ""
    if not isinstance(e, (errors.UserError, flags.Error)):
      frame = traceback.extract_tb(e.__traceback__)[-1]
      where = f" ({type(e).__name__}, {frame.filename}:{frame.lineno})"
    _fail(f"{e}{where}", code=2)


def _config_and_workdir() -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  config, workdir = _CONFIG.value, _WORKDIR.value
  if workdir is not None:
    workdir = pathlib.Path(workdir)
  if config is not None:
    return config, workdir or experiment.default_workdir(config)
  if workdir is None:
    raise errors.UserError(
      "no run: give --config, such as --config=configs/quickstart.py, or the"
      " --workdir of a run; --help says more"
    )
  config = experiment.read_config(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there to go on with; give --config to begin one"
    )
  return config, workdir


def _fail(message: str, code: int) -> NoReturn:
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  sys.stdout.flush()
  # Threads of libraries that met the same error would add theirs at the exit.
  os._exit(code)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
