r"""Trains or evaluates a Vision Transformer, with a norm or without one.

  python -m rescalevit_jax.main --config=configs/quickstart.py
  python -m rescalevit_jax.main --config=configs/vit_b16_rescale.py \
      --workdir=runs/a --config.dataset=cifar100 --config.model.norm=BN
  python -m rescalevit_jax.main --workdir=runs/a --mode=eval

The same command again goes on where the run stopped; --workdir alone is enough
for that. Exit code: 0 when finished, or saved and stopped by a signal, 1 after
an error, 2 for a mistake on the command line, 130 after a second Ctrl-C. Config
keys, set by --config.KEY=VALUE:

"""

if __name__ == "__main__":
  from rescalevit_jax.runtime import huge_pages

  # Before the imports below, which take a second.
  huge_pages.restart_with("rescalevit_jax.main")

import json
import os
import sys
from typing import NoReturn

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.config import overrides
from rescalevit_jax.distributed import processes
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import resumed_config
from rescalevit_jax.runtime import cache
from rescalevit_jax.runtime import cuda_plugin
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import train

__doc__ += keys.describe("  {name} = {default}\n      {meaning}")

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "File with a function get_config(), such as configs/quickstart.py;"
  " FILE:ARGS calls get_config(ARGS). Default: config.json of --workdir.",
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
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes that neither srun,"
  " mpirun nor Kubernetes started.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "How many processes work on this run; 1: this one alone, whatever started"
  " it.",
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0 on.", lower_bound=0
)


def main(argv: list[str]) -> None:
  """Trains or evaluates, as the flags say."""
  if len(argv) > 1:
    _fail(f"unknown argument {argv[1]!r}: flags begin with --", code=2)
  terminal.log_to_stderr()
  config = _CONFIG.value
  workdir = _WORKDIR.value or folder.default_workdir(config)
  if config.deterministic:  # Read when JAX starts the devices, below.
    flag = "--xla_gpu_deterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  cuda_plugin.hide_if_compile_only()
  cache.enable_compilation_cache()
  try:
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _MODE.value == "train":
      train.train_and_evaluate(config, workdir, _draw_attention)
    else:
      result = evaluate.evaluate_run(config, workdir)
      if jax.process_index() == 0:
        print(json.dumps(result))
  except (errors.UserError, OSError) as e:
    _fail(str(e), code=1)
  except jax.errors.JaxRuntimeError as e:
    advice = ""
    if "RESOURCE_EXHAUSTED" in str(e) or "emory" in str(e):
      advice = ": try a smaller batch, or accum_steps and a smaller batch_eval"
    _fail(f"{' '.join(str(e).split())[:300]}{advice}", code=1)
  except KeyboardInterrupt:
    _fail("interrupted; a saved run goes on by the same command", code=130)


def _draw_attention(step, experiment, variables):
  # Its import takes half a second, which the first step need not wait for.
  from rescalevit_jax.analysis import attention_plots

  return attention_plots.draw_during_training(step, experiment, variables)


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it or in the config is one line."""
  try:
    argv, nones = _prepared(argv)
    rest = flags.FLAGS(argv)
    if _CONFIG.value is None:
      raise errors.UserError("--config: get_config() returns None")
    _CONFIG.value.update_from_flattened_dict(nones)
    config_lib.validate(_CONFIG.value)
    return rest
  except SystemExit:  # After --help, which absl ends with an error's code.
    sys.exit(0)
  except Exception as e:  # get_config() may raise anything.
    _fail(errors.explain(e, (errors.UserError, flags.Error)), code=2)


def _prepared(argv: list[str]) -> tuple[list[str], dict[str, None]]:
  """Does what absl and ml_collections leave to us.

  Returns:
    The command line with --config, and the keys to be set to None.
  """
  argv = list(argv)
  given = [arg.lstrip("-").partition("=") for arg in argv]
  names = [name for name, _, _ in given]
  if any(name in ("help", "helpshort", "helpfull") for name in names):
    return argv, {}
  if "config" not in names:
    workdir = None
    if "workdir" in names:
      i = names.index("workdir")
      workdir = given[i][2] or (argv[i + 1] if i + 1 < len(argv) else "")
    if not workdir:
      raise errors.UserError(
        "no run: give --config, such as --config=configs/quickstart.py, or the"
        " --workdir of a run; --help says more"
      )
    resumed_config.get_config(
      workdir
    )  # Its errors, without ml_collections' words.
    argv.insert(1, f"--config={resumed_config.__file__}:{workdir}")
  rest, settings = overrides.split_argv(argv)
  texts = {setting.key: setting.text for setting in settings}
  nones = {key: None for key, text in texts.items() if text == "None"}
  values = [f"--config.{key}={x}" for key, x in texts.items() if x != "None"]
  # Flags end at "--", and ml_collections reads overrides after --config only.
  end = rest.index("--") if "--" in rest else len(rest)
  return [*rest[:end], *values, *rest[end:]], nones


def _fail(message: str, code: int) -> NoReturn:
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  sys.stdout.flush()
  # Threads of libraries that met the same error would add theirs at the exit.
  os._exit(code)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
