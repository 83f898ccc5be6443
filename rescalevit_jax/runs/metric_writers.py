"""Writers of a run's metrics: metrics.jsonl and TensorBoard."""

from collections.abc import Callable, Mapping
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

import ml_collections
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import tensorflow_cpu

_log = logging.getLogger(__name__)
_EVENT_FILES = "events.out.tfevents.*"


class MetricWriter:
  """Writes scalars to metrics.jsonl and TensorBoard.

  metrics.jsonl has one object per line: step, then scalars. It holds only
  values that a repeated run reproduces; timings go to TensorBoard alone.

  Args:
    workdir: the run's folder.
    config: of the run, for TensorBoard.
    keep: returns whether a line of an earlier process stays. A resumed run
      writes the lines after its checkpoint again.
    first_step: the first step that is written; TensorBoard drops what an
      earlier process wrote from there on.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    keep: Callable[[Mapping[str, Any]], bool],
    first_step: int = 1,
  ):
    path = workdir / folder_lib.METRICS
    if path.exists():
      text = path.read_text(encoding="utf-8", errors="replace")
      lines = text.splitlines()
      kept = [
        line for line in lines if _is_whole(line) and keep(json.loads(line))
      ]
      atomic_file.write(path, "".join(f"{line}\n" for line in kept))
    self._file = open(path, "a", encoding="utf-8")
    self._board = _TensorBoard(workdir, config, first_step)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info):
    self._file.close()
    self._board.close()

  def open(self) -> None:
    """Open the TensorBoard file now: the first write would take seconds."""
    self._board.open()

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    timings: Mapping[str, float] | None = None,
  ) -> None:
    """Write one line of scalars; `timings` to TensorBoard only."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()
    self._board.write(step, {**scalars, **(timings or {})})

  def write_images(
    self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]
  ) -> None:
    """Write images to TensorBoard.

    Args:
      step: of the run.
      draw: returns images by name, uint8 [H, W, 3]. An exception ends the
        TensorBoard file, not the run.
    """
    self._board.write_images(step, draw)

  def sync(self) -> None:
    """Flush all lines to disk."""
    self._file.flush()
    os.fsync(self._file.fileno())


class _TensorBoard:
  """clu's writer, created at first use: importing TensorFlow takes seconds.

  If it fails, one warning is logged and training continues.
  """

  def __init__(self, workdir, config, first_step):
    self._workdir = workdir
    self._first_step = first_step
    self._config = config
    self._writer = None
    self._works = True

  def open(self):
    self._try(lambda writer: None)

  def write(self, step, scalars):
    self._try(lambda writer: writer.write_scalars(step, scalars))

  def write_images(self, step, draw):
    def write(writer):
      images = {name: image[None] for name, image in draw().items()}
      writer.write_images(step, images)

    self._try(write)

  def close(self):
    if self._writer is not None:
      self._try(lambda writer: writer.close())

  def _try(self, action):
    if not self._works:
      return
    try:
      if self._writer is None:
        self._writer = self._create()
      action(self._writer)
    except Exception as e:  # TensorFlow raises any type.
      self._works = False
      _log.warning("TensorBoard: no further files (%s)", errors.brief(e))

  def _create(self):
    tensorflow_cpu.load()
    try:
      from clu import metric_writers
    except ImportError as e:
      raise errors.UserError(f"cannot import clu.metric_writers: {e}") from e
    if any(self._workdir.glob(_EVENT_FILES)):
      _drop_events(self._workdir, self._first_step)
    writer = metric_writers.SummaryWriter(str(self._workdir))
    values = config_lib.flatten(self._config)
    writer.write_hparams(
      {k: str(v) if v is None else v for k, v in values.items()}
    )
    text = config_lib.to_json(self._config)
    writer.write_texts(0, {"config": f"```json\n{text}```"})
    return writer


def _drop_events(workdir, first_step):
  """Tell TensorBoard to ignore earlier events from a step on.

  An event file of its own, since TensorFlow's writer cannot write such events.
  TensorBoard reads files in the order of their names, so this one gets the name
  of the newest earlier file with a suffix.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.summary.writer import event_file_writer

  earlier = max(path.name for path in workdir.glob(_EVENT_FILES))
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  with tempfile.TemporaryDirectory() as folder:
    writer = event_file_writer.EventFileWriter(folder)
    # TensorBoard takes the first start of a folder for that of the run.
    for _ in range(2):
      writer.add_event(
        event_pb2.Event(
          wall_time=time.time(), step=first_step, session_log=start
        )
      )
    writer.close()
    (written,) = pathlib.Path(folder).iterdir()
    shutil.copyfile(written, workdir / f"{earlier}.resumed")


def _is_whole(line):
  try:
    return "step" in json.loads(line)
  except (RecursionError, TypeError, ValueError):
    return False  # Cut off when the process was killed.
