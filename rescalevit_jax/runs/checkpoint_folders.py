"""The folders of a run's checkpoints: which there are, which are whole.

checkpoints/last/STEP/{variables,optimizer,loss_scale,progress}
checkpoints/best/STEP/{variables,progress}
checkpoints/damaged/{last,best}-STEP    out of a resumed run's way
checkpoints/forgotten                   while it is deleted
"""

import itertools
import logging
import pathlib
import shutil

from rescalevit_jax import errors
from rescalevit_jax.runs import checksums

_log = logging.getLogger(__name__)


def saved_steps(workdir: pathlib.Path, kind: str) -> list[int]:
  """Returns the steps whose checkpoints lie in a run's folder.

  Args:
    workdir: the run's folder, which need not exist.
    kind: 'last' or 'best'.
  """
  folder = pathlib.Path(workdir) / "checkpoints" / kind
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())


def forget_best(workdir: pathlib.Path, after: int) -> None:
  """Deletes best checkpoints of later steps.

  Each is gone at once: what is left when one is deleted file by file, and the
  process killed, would be taken for a damaged one.
  """
  folder = pathlib.Path(workdir) / "checkpoints"
  away = folder / "forgotten"
  for step in saved_steps(workdir, "best"):
    if step > after:
      shutil.rmtree(away, ignore_errors=True)
      (folder / "best" / str(step)).rename(away)
  shutil.rmtree(away, ignore_errors=True)


def pass_over_damaged(workdir: pathlib.Path) -> None:
  """Moves damaged checkpoints away, so that the newest one is whole.

  Args:
    workdir: the run's folder.

  Raises:
    UserError: there are checkpoints to go on from, but none is whole.
  """
  damaged = {kind: _newest_damaged(workdir, kind) for kind in ("last", "best")}
  if damaged["last"] and len(damaged["last"]) == len(
    saved_steps(workdir, "last")
  ):
    raise errors.UserError(
      f"{'; '.join(damaged['last'].values())}: no checkpoint of this run is"
      " whole; bring a copy of one back, or begin anew in another --workdir"
    )
  for kind, reasons in damaged.items():
    for step, reason in reasons.items():
      away = _unused(_damaged(workdir) / f"{kind}-{step}")
      away.parent.mkdir(exist_ok=True)
      (away.parents[1] / kind / str(step)).rename(away)
      _log.warning("%s; passed over and moved to %s", reason, away)


def was_damaged(workdir: pathlib.Path, kind: str, step: int) -> bool:
  """Whether the checkpoint of a step has been moved away."""
  return (_damaged(workdir) / f"{kind}-{step}").exists()


def _newest_damaged(workdir, kind):
  """Returns {step: what is wrong} of those newer than the newest whole one."""
  damaged = {}
  for step in reversed(saved_steps(workdir, kind)):
    try:
      checksums.verify(pathlib.Path(workdir) / "checkpoints" / kind / str(step))
      break
    except errors.UserError as e:
      damaged[step] = str(e)
  return damaged


def _damaged(workdir):
  return pathlib.Path(workdir) / "checkpoints" / "damaged"


def _unused(path):
  names = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
  return next(p for p in itertools.chain([path], names) if not p.exists())
