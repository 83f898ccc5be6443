"""Checkpoint folders on disk: find damaged ones, delete outdated ones.

checkpoints/last/STEP/{variables,optimizer,loss_scale,progress}
checkpoints/best/STEP/{variables,progress}
checkpoints/damaged/{last,best}-STEP    moved there when a run resumes
checkpoints/deleted                     while it is deleted
"""

import itertools
import logging
import pathlib
import shutil

from rescalevit_jax import errors
from rescalevit_jax.runs import checksums
from rescalevit_jax.runs import folder

_log = logging.getLogger(__name__)


def delete_best(workdir: pathlib.Path, after: int) -> None:
  """Delete the best checkpoints of steps later than `after`.

  Each is renamed first: a folder that a killed process has half deleted would
  count as damaged.
  """
  deleted = folder.checkpoints(workdir, "deleted")
  for step in folder.saved_steps(workdir, "best"):
    if step > after:
      shutil.rmtree(deleted, ignore_errors=True)
      (folder.checkpoints(workdir, "best") / str(step)).rename(deleted)
  shutil.rmtree(deleted, ignore_errors=True)


def move_damaged(workdir: pathlib.Path) -> None:
  """Move checkpoints away that are damaged and newer than the last intact one.

  Raise UserError if there are checkpoints to resume from, but all are damaged.
  """
  damaged = {kind: _newest_damaged(workdir, kind) for kind in ("last", "best")}
  last = damaged["last"]
  if last and len(last) == len(folder.saved_steps(workdir, "last")):
    raise errors.UserError(
      f"{'; '.join(last.values())}: all checkpoints of this run are damaged;"
      " restore a copy of one or start in another --workdir"
    )
  for kind, reasons in damaged.items():
    for step, reason in reasons.items():
      target = _unused(_damaged(workdir, kind, step))
      target.parent.mkdir(exist_ok=True)
      (folder.checkpoints(workdir, kind) / str(step)).rename(target)
      _log.warning("%s; skipped this checkpoint, moved to %s", reason, target)


def was_damaged(workdir: pathlib.Path, kind: str, step: int) -> bool:
  """Return whether the checkpoint of a step has been moved away."""
  return _damaged(workdir, kind, step).exists()


def _newest_damaged(workdir, kind):
  """Return {step: reason} of those newer than the newest intact one."""
  damaged = {}
  for step in reversed(folder.saved_steps(workdir, kind)):
    try:
      checksums.verify(folder.checkpoints(workdir, kind) / str(step))
      break
    except errors.UserError as e:
      damaged[step] = str(e)
  return damaged


def _damaged(workdir, kind, step):
  return folder.checkpoints(workdir, "damaged") / f"{kind}-{step}"


def _unused(path):
  names = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
  return next(p for p in itertools.chain([path], names) if not p.exists())
