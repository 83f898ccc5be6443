"""Orbax checkpoints: the last ones, to go on from, and the best one.

Where they lie is in `checkpoint_folders`. `variables` holds the collections
`params` and `batch_stats` as they are evaluated; where those are averages over
the steps, `optimizer` has the ones that training goes on with. `loss_scale` is
there if the run computes in float16. A checkpoint is
written to a temporary folder and renamed, so that what has its final name was
whole; sums of its files tell whether it still is.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from rescalevit_jax import errors
from rescalevit_jax.distributed import processes
from rescalevit_jax.runs import checkpoint_folders
from rescalevit_jax.runs import checksums

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
  """What a run knows about itself beside its state; saved with it.

  Attributes:
    step: steps done.
    best_accuracy: highest test accuracy so far, in [0, 1].
    best_step: the first step that reached it.
    last_accuracy: test accuracy of the last evaluation.
    last_loss: test loss of the last evaluation.
    last_step: step of the last evaluation; 0 before the first.
    examples_evaluated: test images counted by the last evaluation.
    seconds: wall time of the run, restarts included.
    timed_steps: training steps in `timed_seconds`.
    timed_seconds: time of training alone: no compilation, no evaluation.
    summed_steps: steps since the last line of diagnostics.
    clipped_steps: how many of them had their gradient clipped.
    effective_lr: sum of their learning rates after clipping.
    skipped_steps: steps of the run whose gradient overflowed float16.
  """

  step: int = 0
  best_accuracy: float = -1.0
  best_step: int = 0
  last_accuracy: float = -1.0
  last_loss: float = -1.0
  last_step: int = 0
  examples_evaluated: int = 0
  seconds: float = 0.0
  timed_steps: int = 0
  timed_seconds: float = 0.0
  summed_steps: int = 0
  clipped_steps: int = 0
  effective_lr: float = 0.0
  skipped_steps: int = 0


class Checkpoints:
  """The checkpoints of a run; saving is asynchronous.

  Args:
    workdir: the run's folder.
    keep: how many of the last ones to keep.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 1):
    self._workdir = pathlib.Path(workdir)
    self._last = _manager(workdir, "last", keep)
    self._best = _manager(workdir, "best", 1)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info):
    with _writing(self._last):
      self._last.close()
      self._best.close()

  def latest_step(self) -> int | None:
    """Returns the step that a run would go on from, None if there is none."""
    return self._last.latest_step()

  def save(self, items: Mapping[str, Any], progress: Progress) -> None:
    """Saves a checkpoint to resume from.

    Args:
      items: trees by name: `variables`, `optimizer` and perhaps `loss_scale`.
      progress: of the run.

    Raises:
      UserError: it, or the one before it, cannot be written.
    """
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    args["progress"] = ocp.args.JsonSave(dataclasses.asdict(progress))
    with _writing(self._last):
      self._best.wait_until_finished()  # `progress` tells of it.
      self._last.save(progress.step, args=ocp.args.Composite(**args))

  def save_best(self, variables: Mapping[str, Any], progress: Progress) -> None:
    """Saves the best variables so far.

    Raises:
      UserError: they, or those before them, cannot be written.
    """
    with _writing(self._best):
      if jax.process_count() > 1:
        # Orbax's barriers of two managers at a time get in each other's way.
        self._last.wait_until_finished()
      self._best.save(
        progress.step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardSave(variables),
          progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        ),
      )

  def restore(self, like: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
    """Restores the latest checkpoint; deletes best ones of later steps.

    Args:
      like: the trees of `save`, of `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      The trees and the progress. `loss_scale` is left out if it was not saved.

    Raises:
      UserError: the checkpoint cannot be read or is of another model.
    """

    def read(manager, step):
      saved = pathlib.Path(manager.directory) / str(step)
      args = {
        name: ocp.args.StandardRestore(tree)
        for name, tree in like.items()
        if name != "loss_scale" or (saved / name).exists()
      }
      args["progress"] = ocp.args.JsonRestore()
      return dict(manager.restore(step, args=ocp.args.Composite(**args)))

    items = _restore(self._last, read)
    progress = Progress(**items.pop("progress"))
    self.forget_best(after=progress.best_step)
    best = progress.best_step
    if best in (0, *self._best.all_steps()):
      return items, progress
    if checkpoint_folders.was_damaged(self._workdir, "best", best):
      _log.warning(
        "the weights of the best step so far, %d, are lost; those of the next"
        " better one will be kept",
        best,
      )
    else:
      # A better one has replaced it, which the run will come to again.
      progress.best_accuracy, progress.best_step = -1.0, 0
    return items, progress

  def forget_best(self, after: int) -> None:
    """Deletes best variables of later steps: of a future that was cut off.

    Raises:
      UserError: they cannot be moved out of the way.
    """
    processes.wait_for_all("best checkpoints listed")
    if jax.process_index() == 0:
      with _writing(self._best):
        checkpoint_folders.forget_best(self._workdir, after)
    processes.wait_for_all("best checkpoints forgotten")
    self._best.reload()

  def wait(self) -> None:
    """Waits until all is on disk; raises UserError if it cannot be."""
    with _writing(self._last):
      self._best.wait_until_finished()
      self._last.wait_until_finished()


def load_variables(
  workdir: pathlib.Path, which: str
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """Reads a run's weights, whatever its model, onto the first own device.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest'.

  Returns:
    The trees `params` and `batch_stats`, and the step.

  Raises:
    UserError: there is no checkpoint, or it is damaged.
  """
  kinds = {"best": "best", "latest": "last"}
  if which not in kinds:
    raise errors.UserError(
      f"unknown checkpoint {which!r}; {errors.nearest(which, kinds)}"
    )
  kind = kinds[which]
  if not checkpoint_folders.saved_steps(workdir, kind):
    raise errors.UserError(
      f"{workdir}: no {which} checkpoint; --workdir must be the folder of a run"
      " that has saved one"
    )
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def read(manager, step):
    checksums.verify(pathlib.Path(manager.directory) / str(step))
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      manager.item_metadata(step)["variables"],
    )
    args = ocp.args.Composite(variables=ocp.args.StandardRestore(like))
    return manager.restore(step, args=args)["variables"], step

  with _manager(workdir, kind, None, readonly=True) as manager:
    variables, step = _restore(manager, read)
  return variables["params"], variables["batch_stats"], step


def _manager(workdir, kind, keep, *, readonly=False):
  folder = (pathlib.Path(workdir) / "checkpoints" / kind).absolute()

  def write_checksums():
    # Called before the folder gets its final name; one is written at a time.
    for temporary in folder.glob("*.orbax-checkpoint-tmp"):
      checksums.write(temporary)

  return ocp.CheckpointManager(
    folder,
    item_handlers={
      "variables": ocp.StandardCheckpointHandler(),
      "optimizer": ocp.StandardCheckpointHandler(),
      "loss_scale": ocp.StandardCheckpointHandler(),
      "progress": ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=not readonly,
      # What another process is writing just now is left alone.
      cleanup_tmp_directories=not readonly,
      async_options=ocp.AsyncOptions(
        post_finalization_callback=write_checksums
      ),
    ),
  )


@contextlib.contextmanager
def _writing(manager):
  try:
    yield
  except Exception as e:  # Orbax and tensorstore raise all sorts.
    raise errors.UserError(
      f"{manager.directory}: cannot write the checkpoint ({errors.brief(e)});"
      " free some space or mend the folder, then start the same command again"
    ) from e


def _restore(manager, read):
  step = manager.latest_step()
  folder = pathlib.Path(manager.directory) / str(step)
  try:
    return read(manager, step)
  except Exception as e:  # Orbax and tensorstore raise all sorts.
    raise errors.UserError(
      f"{folder}: the checkpoint is damaged or not of this model"
      f" ({errors.brief(e)}); move it away to use another one, if there is one"
    ) from e
