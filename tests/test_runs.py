"""Runs read back from their folders."""

import json

import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import runs


def write(folder, lines=(), result=None):
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config_lib.to_json(config_lib.default()))
  (folder / "metrics.jsonl").write_text("".join(lines))
  if result is not None:
    (folder / "result.json").write_text(json.dumps(result))


def test_reads_config_curves_and_result(tmp_path):
  result = {"last_accuracy": 0.5, "best_accuracy": 0.6, "best_step": 2}
  lines = [
    '{"step": 2, "train/loss": 3.0}\n',
    '{"step": 2, "test/accuracy": 0.6}\n',
    '{"step": 4, "train/loss": 2.0}\n',
    '{"step": 4, "te',  # Cut off by a kill.
  ]
  write(tmp_path / "a", lines, result)
  run = runs.read(tmp_path / "a")
  assert run.config.total_steps == 20_000
  assert run.result == result
  assert run.step == 4
  assert run.curve("train/loss") == ([2, 4], [3.0, 2.0])
  assert run.curve("test/accuracy") == ([2], [0.6])
  assert run.curve("nothing") == ([], [])


def test_a_run_that_has_only_begun(tmp_path):
  write(tmp_path / "a")
  (tmp_path / "a" / "metrics.jsonl").unlink()
  run = runs.read(tmp_path / "a")
  assert (run.step, run.result, run.metrics) == (0, None, [])


def test_finds_runs_below_and_names_the_damaged(tmp_path):
  write(tmp_path / "b")
  write(tmp_path / "deep" / "a")
  write(tmp_path / "bad")
  (tmp_path / "bad" / "result.json").write_text("{")
  write(tmp_path / "worse")
  (tmp_path / "worse" / "config.json").write_bytes(b"\xff")
  found, damaged = runs.find(tmp_path)
  assert [run.workdir.name for run in found] == ["b", "a"]
  assert len(damaged) == 2
  assert "bad" in damaged[0] and "worse" in damaged[1]


def test_a_line_of_metrics_that_is_no_text_is_left_out(tmp_path):
  write(tmp_path / "a")
  (tmp_path / "a" / "metrics.jsonl").write_bytes(
    b'{"step": 1, "x": 1}\n\xff\xfe\n{"step": 2, "x": 3}\n'
  )
  assert runs.read(tmp_path / "a").curve("x") == ([1, 2], [1, 3])


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_no_runs(tmp_path, name):
  with pytest.raises(errors.UserError, match="no "):
    runs.find(tmp_path / name)
  with pytest.raises(errors.UserError, match="no run there"):
    runs.read(tmp_path / name)
