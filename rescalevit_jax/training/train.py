"""A run from its folder to its result."""

import contextlib
import functools
import logging
import pathlib
import tempfile
from typing import Any

import jax
import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.distributed import processes
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import checkpoint_folders
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runs import lock
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import preemption
from rescalevit_jax.training import progress as progress_lib
from rescalevit_jax.training import trainer as trainer_lib

_log = logging.getLogger(__name__)


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  draw_attention: trainer_lib.DrawAttention | None = None,
) -> dict[str, Any] | None:
  """Train and evaluate a model; resume the run if its folder has checkpoints.

  Returns:
    The content of result.json, or None if a signal stopped the run.
  """
  workdir = pathlib.Path(workdir)
  config_lib.validate(config)
  with _own_folder(workdir) as folder:
    return _train_and_evaluate(config, workdir, folder, draw_attention)


@contextlib.contextmanager
def _own_folder(workdir):
  """Lock and return the run's folder; in other processes a temporary one.

  Only the first process writes results. All write checkpoints, through orbax.
  """
  if jax.process_index() == 0:
    with lock.hold(workdir):
      yield workdir
  else:
    with tempfile.TemporaryDirectory() as folder:
      yield pathlib.Path(folder)


def _train_and_evaluate(config, workdir, folder, draw_attention):
  result = result_lib.read_same_run(config, workdir)
  if result_lib.has_diverged(result):
    raise errors.UserError(f"{workdir}: {result['error']}")
  if result is not None:
    _log.info(
      "%s: already finished: %s", workdir, result_lib.accuracies(result)
    )
    return result
  if jax.process_index() == 0:
    checkpoint_folders.move_damaged(workdir)
  processes.wait_for_all("checkpoints checked")
  experiment = experiment_lib.create(config)
  state, progress = None, checkpoint.Progress()
  if not folder_lib.saved_steps(workdir, "last"):
    state = initial_state.create(experiment)
  with (
    checkpoint.Checkpoints(workdir, config.keep_checkpoints) as checkpoints,
    preemption.StopSignal() as stop,
  ):
    if state is None:
      folder_lib.check_class_names(workdir, experiment.dataset.class_names)
      abstract = experiment.abstract_state()
      items, progress = checkpoints.restore(abstract.to_checkpoint())
      state = abstract.from_checkpoint(items, progress.skipped_steps)
      _check_train_images(workdir, progress, experiment)
      _log.info("resuming from step %d", progress.step)
    else:
      checkpoints.delete_best(after=0)
    progress.train_images = len(experiment.dataset.train)
    progress.dtype = _dtypes(progress.dtype, experiment.model.config.dtype)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    atomic_file.remove_temporary(folder)
    # Of a diverged run with another config.
    (folder / folder_lib.RESULT).unlink(missing_ok=True)
    atomic_file.write(folder / folder_lib.CONFIG, config_lib.to_json(config))
    atomic_file.write_json(
      folder / folder_lib.CLASS_NAMES, experiment.dataset.class_names
    )
    keep = functools.partial(_is_of_the_past, progress)
    with metric_writers.MetricWriter(
      folder, config, keep, progress.step + 1
    ) as writer:
      trainer = trainer_lib.Trainer(
        experiment, state, progress, checkpoints, writer, folder, draw_attention
      )
      del state  # Its buffers are donated to the next step.
      try:
        finished = trainer.run(stop)
      except trainer_lib.DivergedError as e:
        diverged = result_lib.diverged(progress.step, str(e))
        result_lib.write(folder, diverged)
        raise
  if not finished:
    _log.info(
      "saved checkpoint and stopped at step %d of %d; run the same command to"
      " resume",
      progress.step,
      config.total_steps,
    )
    return None
  evaluation = trainer.final_evaluation()
  evaluation.write(folder, config.save_predictions)
  result = result_lib.create(
    progress,
    evaluation.summary,
    images_per_second=progress_lib.images_per_second(
      progress.timed_steps, progress.timed_seconds, config.batch
    ),
    parameters=parameters,
  )
  result_lib.write(folder, result)
  _log.info("finished: %s; see %s", result_lib.accuracies(result), workdir)
  return result


def _check_train_images(workdir, progress, experiment):
  """Raise UserError if the number of training images has changed."""
  images = len(experiment.dataset.train)
  if progress.train_images not in (0, images):
    raise errors.UserError(
      f"{workdir}: the run began with {progress.train_images} training images,"
      f" its dataset has {images} now; restore the dataset, or start a run in"
      " another --workdir"
    )


def _dtypes(before, now):
  """Return a run's dtypes in order; warn if the dtype changes."""
  last = before.split(" then ")[-1]
  if last in ("", now):
    return now if not before else before
  _log.warning(
    "dtype: the run continues in %s after %s, so its results differ from those"
    " of an uninterrupted run; to avoid this, start a new run with a fixed"
    " dtype",
    now,
    last,
  )
  return f"{before} then {now}"


def _is_of_the_past(progress, line):
  """Return whether a metrics line precedes the checkpoint."""
  if "test/loss" in line:
    return line["step"] <= progress.last_step
  return line["step"] <= progress.step
