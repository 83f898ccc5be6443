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
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import tensorflow_cpu

_log = logging.getLogger(__name__)
_EVENT_FILES = "events.out.tfevents.*"


class MetricWriter:
  """Writes scalars to metrics.jsonl and TensorBoard.

  metrics.jsonl has one object per line: step, then scalars. It holds only
  values that a repeated run reproduces; timings go to TensorBoard alone. If
  TensorBoard's files cannot be written, one warning is logged and training
  continues.

  A resumed run writes the lines after its checkpoint again. Earlier lines stay
  if `keep` returns True; TensorBoard's events from `first_step` on are deleted.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    keep: Callable[[Mapping[str, Any]], bool],
    first_step: int = 1,
  ):
    self._workdir, self._config = workdir, config
    self._first_step = first_step
    kept = filter(keep, run_reader.read_metrics(workdir))
    path = workdir / folder_lib.METRICS
    atomic_file.write(path, "".join(f"{json.dumps(line)}\n" for line in kept))
    self._file = open(path, "a", encoding="utf-8")
    self._board: Any = None  # clu's writer.
    self._board_works = True

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info):
    self._file.close()
    if self._board is not None:
      self._to_board(lambda board: board.close())

  def open(self) -> None:
    """Open the TensorBoard file now: the first write would take seconds."""
    self._to_board(lambda board: None)

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    timings: Mapping[str, float] | None = None,
  ) -> None:
    """Write one line of scalars; `timings` to TensorBoard only."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()
    values = {**scalars, **(timings or {})}
    self._to_board(lambda board: board.write_scalars(step, values))

  def write_images(
    self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]
  ) -> None:
    """Write drawn images to TensorBoard: uint8 [H, W, 3], by name.

    An exception in `draw` ends the TensorBoard file, not the run.
    """

    def write(board):
      images = {name: image[None] for name, image in draw().items()}
      board.write_images(step, images)

    self._to_board(write)

  def sync(self) -> None:
    """Flush all lines to disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def _to_board(self, action):
    if not self._board_works:
      return
    try:
      if self._board is None:
        self._board = self._create_board()
      action(self._board)
    except Exception as e:  # TensorFlow raises any type.
      self._board_works = False
      _log.warning("TensorBoard: no further files (%s)", errors.brief(e))

  def _create_board(self):
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

  Write a separate event file: TensorFlow's writer cannot write such events.
  TensorBoard reads files in the order of their names, so this one gets the name
  of the newest earlier file with a suffix.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.summary.writer import event_file_writer

  earlier = max(path.name for path in workdir.glob(_EVENT_FILES))
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  with tempfile.TemporaryDirectory() as folder:
    writer = event_file_writer.EventFileWriter(folder)
    # TensorBoard ignores the first start event of a folder.
    for _ in range(2):
      writer.add_event(
        event_pb2.Event(
          wall_time=time.time(), step=first_step, session_log=start
        )
      )
    writer.close()
    (written,) = pathlib.Path(folder).iterdir()
    shutil.copyfile(written, workdir / f"{earlier}.resumed")
