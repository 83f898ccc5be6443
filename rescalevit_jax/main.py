r"""Train or evaluate a Vision Transformer, with a norm or without one.

  python -m rescalevit_jax.main --config=configs/quickstart.py
  python -m rescalevit_jax.main --config=configs/vit_b16_rescale.py \
      --workdir=runs/a --config.dataset=cifar100 --config.model.norm=BN
  python -m rescalevit_jax.main --workdir=runs/a --mode=eval

The same command resumes a run that stopped; --workdir alone is enough. Exit
code: 0 if the run finished, or a signal stopped it after a checkpoint; 1 after
an error; 2 for an error in the command line; 130 after Ctrl-C outside the
training loop, or a second one. Config keys, set by --config.KEY=VALUE:

"""

import os
import signal


def _interrupt(number, frame):
  """Handle Ctrl-C outside the training loop, or a second one within it.

  No KeyboardInterrupt: Python prints and drops those that arise in callbacks.
  """
  del number, frame
  try:
    os.write(2, b"error: interrupted; run the same command to resume\n")
  finally:  # Also if stderr is closed.
    os._exit(130)


if __name__ == "__main__":
  from rescalevit_jax.runtime import fast_imports
  from rescalevit_jax.runtime import malloc

  # Before the imports below, which take a second.
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # As under nohup.
    signal.signal(signal.SIGINT, _interrupt)
  malloc.restart_with("rescalevit_jax.main")
  fast_imports.begin()

import json
import pathlib
import sys

from absl import app
from absl import flags
import jax
import ml_collections

from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.config import overrides
from rescalevit_jax.distributed import processes
from rescalevit_jax.runs import folder
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import compat
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import evaluate_run
from rescalevit_jax.training import train

__doc__ += keys.describe("  {name} = {default}\n      {meaning}")

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "File with a function get_config(), such as configs/quickstart.py;"
  " FILE:ARGS calls get_config(ARGS). Default: config.json of --workdir."
  " --config.KEY=VALUE overrides a key.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run. Default: runs/DATASET-MODEL-NORM-scratch-seed0, or"
  " -pretrained-.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "probe"],
  "Train and evaluate; or only evaluate the weights that --config.eval_weights"
  " selects; or classify by their features, with nearest neighbors and a"
  " linear probe.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes that were not"
  " started by srun, mpirun or Kubernetes.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Number of processes of this run; 1: this process alone, even under srun.",
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Index of this process, from 0.", lower_bound=0
)


def main(config: ml_collections.ConfigDict) -> None:
  """Train or evaluate."""
  terminal.log_to_stderr()
  if code := cli.run(lambda: _run(config)):
    sys.stdout.flush()
    # At a normal exit, threads of libraries would print the same error again.
    os._exit(code)


def _run(config):
  workdir = _WORKDIR.value or folder.default_workdir(config)
  if config.deterministic:  # JAX reads it when it starts the devices, below.
    flag = "--xla_gpu_deterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  try:
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _MODE.value == "train":
      result = train.train_and_evaluate(config, workdir, _draw_attention)
    elif _MODE.value == "eval":
      result = evaluate_run.evaluate_run(config, workdir)
    else:
      result = evaluate_run.probe_run(config, workdir)
  except jax.errors.JaxRuntimeError as e:
    advice = ""
    if compat.is_out_of_memory(e):
      advice = "; use a smaller batch, or accum_steps and a smaller batch_eval"
    elif jax.process_count() > 1:
      advice = (
        "; if another process has died, see its log, then start all processes"
        " again to resume"
      )
    message = " ".join(str(e).split())[:300]
    raise errors.UserError(f"{message}{advice}") from e
  except BrokenPipeError as e:  # Not of stdout: nothing is printed above.
    raise errors.UserError(str(e)) from e
  if result is None or jax.process_index() > 0:
    return
  if _MODE.value == "train":
    _draw_confusion(workdir)
  else:
    print(json.dumps(_short(result)))
  if _MODE.value == "eval":
    _draw_confusion(folder.evaluation(workdir, config))


def _draw_attention(step, experiment, variables):
  # Its import takes half a second; the first step does not wait for it.
  from rescalevit_jax.analysis import attention_plots

  return attention_plots.draw_during_training(step, experiment, variables)


def _short(result):
  """Return the scores of an evaluation without those of each class."""
  result = {k: v for k, v in result.items() if k != "per_class"}
  for name, one in result.get("datasets", {}).items():
    result["datasets"][name] = _short(one)
  return result


def _draw_confusion(where):
  from rescalevit_jax.analysis import confusion_plot  # Imports matplotlib.

  confusion_plot.draw_run(pathlib.Path(where))


def parse(argv: list[str]) -> ml_collections.ConfigDict:
  """Parse the command line; return the config.

  Errors in the command line or the config end the process with code 2.
  """
  cli.open_closed_streams()
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    argv, settings = overrides.split_argv(cli.arguments(argv))
    rest = flags.FLAGS(argv)[1:]
    if rest:
      raise errors.UserError(
        f"unknown argument {rest[0]!r}; flags begin with --"
      )
    if _CONFIG.value:
      return overrides.load_config(_CONFIG.value, settings)
    return overrides.update_config(_saved_config(), settings)
  except SystemExit as e:  # absl exits with code 1 after --help.
    sys.exit(0 if e.code == 1 else e.code)
  except BrokenPipeError:
    sys.exit(cli.discard_output())
  except (errors.UserError, flags.Error, OSError) as e:
    sys.exit(cli.fail(str(e), 2))


def _saved_config():
  """Return config.json of --workdir."""
  if not _WORKDIR.value:
    raise errors.UserError(
      "no run given; add --config, such as --config=configs/quickstart.py, or"
      " the --workdir of a run to resume (see --help)"
    )
  config = folder.read_config(_WORKDIR.value)
  if config is None:
    raise errors.UserError(
      f"{_WORKDIR.value}: no run to resume; add --config to start one"
    )
  return config


if __name__ == "__main__":
  fast_imports.end()
  app.run(main, flags_parser=parse)
