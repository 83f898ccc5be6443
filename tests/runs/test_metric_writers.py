"""metrics.jsonl, TensorBoard's event files and atomic writes."""

import json
import os

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from rescalevit_jax import config as config_lib
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.runtime import atomic_file


def create_writer(workdir, keep=lambda line: True, first_step=1):
  config = config_lib.default()
  return metric_writers.MetricWriter(workdir, config, keep, first_step)


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  atomic_file.write(path, "old")

  def fail(*args):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="disk full"):
    atomic_file.write(path, "new")
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.json"]


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    '{"step": 1, "train/loss": 3.0}\n'
    '{"step": 2, "train/loss": 2.0}\n'
    '{"step": 3, "train/loss": 1.0}\n'
    "[1]\n"
    '{"step": 4, "tra'
  )
  with create_writer(tmp_path, lambda line: line["step"] <= 2) as writer:
    writer.write(3, {"train/loss": 1.5}, {"train/images_per_second": 7.0})
    writer.sync()
    lines = [json.loads(x) for x in path.read_text().splitlines()]
  assert [x["step"] for x in lines] == [1, 2, 3]
  assert lines[-1] == {"step": 3, "train/loss": 1.5}


def test_tensorboard_has_scalars_hyperparameters_and_the_config(tmp_path):
  with create_writer(tmp_path) as writer:
    writer.write(3, {"train/loss": 1.5}, {"train/images_per_second": 7.0})
  board = event_accumulator.EventAccumulator(str(tmp_path))
  board.Reload()
  tags = board.Tags()
  found = set(tags["tensors"]) | set(tags["scalars"])
  assert {"train/loss", "train/images_per_second", "config"} <= found
  text = board.Tensors("config")[0].tensor_proto.string_val[0].decode()
  assert '"model_name": "ViT-B_16"' in text
  assert any("hparams" in name for name in found)


def test_an_unwritable_event_file_is_one_warning(tmp_path, monkeypatch, caplog):
  def fail():
    raise OSError("read-only file system")

  monkeypatch.setattr(metric_writers.tensorflow_cpu, "load", fail)
  with create_writer(tmp_path) as writer:
    writer.write(1, {"train/loss": 1.0})
    writer.write(2, {"train/loss": 1.0})
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_tensorboard_shows_repeated_steps_once(tmp_path):
  """A resumed run repeats steps that the killed process has written."""
  pytest.importorskip("tensorflow")
  for i in range(3):  # File names count the writers of a process.
    event_file_writer.EventFileWriter(str(tmp_path / f"other{i}")).close()

  def write(steps, value):
    with create_writer(tmp_path, first_step=steps[0]) as writer:
      for step in steps:
        writer.write(step, {"train/loss": value + step})

  write([1, 2, 3, 4, 5, 6], 1.0)
  (path,) = tmp_path.glob("events.*")
  path.rename(tmp_path / "events.out.tfevents.1000000000.host.1.0.v2")
  write([4, 5, 6], 2.0)
  board = plugin_event_accumulator.EventAccumulator(
    str(tmp_path), {"tensors": 0}
  )
  board.Reload()
  found = [
    (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
    for event in board.Tensors("train/loss")
  ]
  assert found == [(1, 2), (2, 3), (3, 4), (4, 6), (5, 7), (6, 8)]
