"""Orbax checkpoints of a run: the last ones, to resume from, and the best one.

`checkpoint_folders` lists their files. `variables` has the collections `params`
and `batch_stats` that are evaluated. With an EMA these are averages, and
`optimizer` has the values that training continues with. `loss_scale` exists in
float16 only. A checkpoint is written to a temporary folder and renamed when it
is complete; checksums of its files detect damage.
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
from rescalevit_jax.runs import folder as folder_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
  """Counters and results of a run, saved in each checkpoint."""

  step: int = 0  # Steps done.
  best_accuracy: float = -1.0  # Highest test accuracy so far, in [0, 1].
  best_step: int = 0  # The first step that reached it.
  last_accuracy: float = -1.0  # Of the last evaluation, like the next three.
  last_loss: float = -1.0
  last_step: int = 0  # 0 before the first evaluation.
  examples_evaluated: int = 0
  train_images: int = 0  # Number of training images; 0 in old checkpoints.
  seconds: float = 0.0  # Wall time, restarts included.
  timed_steps: int = 0  # Training steps in `timed_seconds`.
  timed_seconds: float = 0.0  # Without compilation and evaluation.
  summed_steps: int = 0  # Steps since the last line of diagnostics.
  clipped_steps: int = 0  # Those among them with a clipped gradient.
  effective_lr: float = 0.0  # Sum of their learning rates after clipping.
  skipped_steps: int = 0  # Steps whose gradient overflowed float16.
  dtype: str = ""  # Of the computation; several if `auto` changed it.


class Checkpoints:
  """The checkpoints of a run, saved asynchronously; keeps the last `keep`."""

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
    """Return the step that a run resumes from, None for the start."""
    return self._last.latest_step()

  def save(self, items: Mapping[str, Any], progress: Progress) -> None:
    """Save trees to resume from: variables, optimizer, perhaps loss_scale."""
    with _writing(self._last):
      self._best.wait_until_finished()  # `progress` refers to it.
      _save(self._last, items, progress)

  def save_best(self, variables: Mapping[str, Any], progress: Progress) -> None:
    """Save the best variables so far."""
    with _writing(self._best):
      if jax.process_count() > 1:
        # Orbax's barriers interfere if two managers save at a time.
        self._last.wait_until_finished()
      _save(self._best, {"variables": variables}, progress)

  def restore(self, like: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
    """Restore the latest checkpoint; delete best ones of later steps.

    Args:
      like: the trees of `save`, of `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      The trees, without `loss_scale` if it was not saved, and the progress.
    """

    def read(manager, step):
      saved = pathlib.Path(manager.directory) / str(step)
      args = {
        name: ocp.args.StandardRestore(tree)
        for name, tree in like.items()
        if name != "loss_scale" or (saved / name).exists()
      }
      args["progress"] = ocp.args.JsonRestore()
      items = dict(manager.restore(step, args=ocp.args.Composite(**args)))
      return items, Progress(**items.pop("progress"))

    items, progress = _restore(self._last, read)
    self.delete_best(after=progress.best_step)
    best = progress.best_step
    if best in (0, *self._best.all_steps()):
      return items, progress
    if checkpoint_folders.was_damaged(self._workdir, "best", best):
      _log.warning(
        "the best checkpoint (step %d) is lost; the next better one will be"
        " saved",
        best,
      )
    else:
      # A later, better one has replaced it; the run reaches that step again.
      progress.best_accuracy, progress.best_step = -1.0, 0
    return items, progress

  def delete_best(self, after: int) -> None:
    """Delete best checkpoints of later steps, which the run repeats."""
    processes.wait_for_all("best checkpoints listed")
    if jax.process_index() == 0:
      with _writing(self._best):
        checkpoint_folders.delete_best(self._workdir, after)
    processes.wait_for_all("best checkpoints deleted")
    self._best.reload()

  def wait(self) -> None:
    """Wait until all is on disk."""
    with _writing(self._last):
      self._best.wait_until_finished()
      self._last.wait_until_finished()


def load_variables(
  workdir: pathlib.Path, which: str
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """Load weights of a run, 'best' or 'latest', onto the first local device.

  Returns:
    The trees `params` and `batch_stats`, and the step.
  """
  kinds = {"best": "best", "latest": "last"}
  if which not in kinds:
    raise errors.UserError(
      f"unknown checkpoint {which!r}; {errors.nearest(which, kinds)}"
    )
  kind = kinds[which]
  steps = folder_lib.saved_steps(workdir, kind)
  if not steps:
    if kind == "best" and folder_lib.saved_steps(workdir, "last"):
      raise errors.UserError(
        f"{workdir}: no best checkpoint yet; choose the latest one by"
        " --checkpoint=latest or --config.eval_weights=latest"
      )
    raise errors.UserError(
      f"{workdir}: no {which} checkpoint; give the folder of a run that has"
      " saved one"
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

  try:
    with _manager(workdir, kind, None, readonly=True) as manager:
      variables, step = _restore(manager, read)
  except errors.UserError:
    if folder_lib.saved_steps(workdir, kind) == steps:
      raise
    # The run is training, and has replaced the checkpoint.
    return load_variables(workdir, which)
  return variables["params"], variables["batch_stats"], step


def _manager(workdir, kind, keep, *, readonly=False):
  folder = folder_lib.checkpoints(workdir, kind).absolute()

  def write_checksums():
    # Called before the folder is renamed; one is written at a time.
    for temporary in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}"):
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
      # Another process may be writing there.
      cleanup_tmp_directories=not readonly,
      async_options=ocp.AsyncOptions(
        post_finalization_callback=write_checksums
      ),
    ),
  )


def _save(manager, items, progress):
  args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
  args["progress"] = ocp.args.JsonSave(dataclasses.asdict(progress))
  manager.save(progress.step, args=ocp.args.Composite(**args))


@contextlib.contextmanager
def _writing(manager):
  try:
    yield
  except Exception as e:  # Orbax and TensorStore raise any type.
    raise errors.UserError(
      f"{manager.directory}: cannot write the checkpoint ({errors.brief(e)});"
      " free some space or repair the folder, then run the same command"
    ) from e


def _restore(manager, read):
  step = manager.latest_step()
  folder = pathlib.Path(manager.directory) / str(step)
  try:
    return read(manager, step)
  except Exception as e:  # Orbax and TensorStore raise any type.
    raise errors.UserError(
      f"{folder}: the checkpoint is damaged or not of this model"
      f" ({errors.brief(e)}); move it away to use an older one"
    ) from e
