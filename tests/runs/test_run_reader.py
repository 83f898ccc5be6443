"""Reading runs from their folders."""

import json
import math
import os
import re

import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import folder
from rescalevit_jax.runs import run_reader


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
    '{"step": 4, "te',  # Truncated by a kill.
  ]
  write(tmp_path / "a", lines, result)
  run = run_reader.read(tmp_path / "a")
  assert run.config.total_steps == 20_000
  assert run.result == {"status": "finished", **result}
  assert run.step == 4
  assert run.curve("train/loss") == ([2, 4], [3.0, 2.0])
  assert run.curve("test/accuracy") == ([2], [0.6])
  assert run.curve("nothing") == ([], [])


def test_an_unfinished_run_without_metrics_is_read(tmp_path):
  write(tmp_path / "a")
  (tmp_path / "a" / "metrics.jsonl").unlink()
  run = run_reader.read(tmp_path / "a")
  assert (run.step, run.result, run.metrics) == (0, None, [])


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_deeply_nested_json_is_damage(name, tmp_path):
  write(tmp_path / "a", ['{"step": 1}\n', "[" * 100_000, '\n{"step": 2}\n'])
  assert run_reader.read(tmp_path / "a").step == 2
  (tmp_path / "a" / name).write_text("[" * 100_000)
  (line,) = run_reader.find(tmp_path).damaged
  assert name in line and "damaged" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("value", [None, "0.5", math.nan, 10**400])
def test_a_result_that_is_not_a_number_is_damage(value, tmp_path):
  result = {"last_accuracy": 0.1, "best_accuracy": value, "best_step": 1}
  write(tmp_path / "a", result=result)
  (line,) = run_reader.find(tmp_path).damaged
  assert line.startswith(f"{tmp_path}/a/result.json: damaged")


def test_runs_of_several_folders_are_read_once(tmp_path, capsys):
  write(tmp_path / "a" / "good")
  write(tmp_path / "b" / "too")
  write(tmp_path / "b" / "bad")
  (tmp_path / "b" / "bad" / "config.json").write_text("{")
  found = run_reader.find_each([tmp_path / "a", tmp_path / "b", tmp_path / "b"])
  assert [run.workdir.name for run in found] == ["good", "too"]
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("left out: ") and "bad" in line


def test_nested_runs_are_found_and_damaged_ones_named(tmp_path):
  write(tmp_path / "b")
  write(tmp_path / "deep" / "a")
  write(tmp_path / "bad")
  (tmp_path / "bad" / "result.json").write_text("{")
  write(tmp_path / "worse")
  (tmp_path / "worse" / "config.json").write_bytes(b"\xff")
  found = run_reader.find(tmp_path)
  assert [run.workdir.name for run in found.runs] == ["b", "a"]
  damaged = found.damaged
  assert len(damaged) == 2 and not found.not_begun
  assert "bad" in damaged[0] and "worse" in damaged[1]


@pytest.mark.parametrize(
  "text", ["null", "[]", "1", '"a"', '{"model": "vit"}', '{"augment": []}', "{"]
)
def test_config_files_of_other_programs_are_named(tmp_path, text):
  write(tmp_path / "a")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "config.json").write_text(text)
  found = run_reader.find(tmp_path)
  assert len(found.runs) == 1 and len(found.damaged) == 1
  assert str(tmp_path / "other" / "config.json") in found.damaged[0]


def test_an_unknown_norm_is_named(tmp_path):
  write(tmp_path / "a")
  path = tmp_path / "a" / "config.json"
  path.write_text(path.read_text().replace('"LN"', '"InstanceNorm"'))
  assert "InstanceNorm" in run_reader.find(tmp_path).damaged[0]


def test_a_run_that_failed_at_startup_is_named(tmp_path):
  write(tmp_path / "a")
  for name, text in {
    ".": "--- of another program",
    "b": "--- start\nerror: no weights\n",
    "c": "--- start\n",
    "d": "a log of something else\n",
  }.items():
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "log.txt").write_text(text)
  found = run_reader.find(tmp_path)
  assert len(found.runs) == 1 and not found.damaged
  assert found.not_begun == [
    f"{tmp_path / 'b'}: error: no weights",
    f"{tmp_path / 'c'}",
  ]
  assert not run_reader.find(tmp_path / "a").not_begun
  with pytest.raises(errors.UserError, match="no runs there"):
    run_reader.find(tmp_path / "b")


def test_links_are_followed_and_runs_read_once(tmp_path):
  write(tmp_path / "elsewhere" / "a")
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "x").symlink_to(tmp_path / "elsewhere" / "a")
  (tmp_path / "runs" / "y").symlink_to(tmp_path / "elsewhere" / "a")
  (tmp_path / "runs" / "back").symlink_to(tmp_path / "runs")
  found = run_reader.find(tmp_path / "runs")
  assert [run.workdir.name for run in found.runs] == ["x"]
  assert not found.damaged


def test_a_linked_run_keeps_its_real_path(tmp_path):
  write(tmp_path / "deep" / "run")
  (tmp_path / "alias").symlink_to(tmp_path / "deep" / "run")
  (run,) = run_reader.find(tmp_path).runs
  assert run.workdir == tmp_path / "deep" / "run"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can list every folder")
def test_an_unreadable_folder_is_named(tmp_path):
  write(tmp_path / "a")
  (tmp_path / "closed").mkdir(mode=0)
  (line,) = run_reader.find(tmp_path).damaged
  assert line.startswith(f"{tmp_path / 'closed'}: cannot be listed")


def test_curves_omit_values_that_are_not_numbers(tmp_path):
  write(tmp_path / "a", ['{"step": 1, "x": null}\n', '{"step": 2, "x": 3}\n'])
  assert run_reader.read(tmp_path / "a").curve("x") == ([2], [3])


def test_runs_that_differ_only_in_seed_share_a_group(tmp_path):
  changes = [
    {"seed": 1},
    {"base_lr": 0.1},
    {"seed": 0, "checkpoint_every": 7},
    {"pretrained_path": "a/x.npz"},
    {"pretrained_path": "b/x.npz"},
  ]
  found = []
  for i, change in enumerate(changes):
    config = config_lib.default()
    config.update(change)
    found.append(run_reader.Run(tmp_path / str(i), config, None, []))
  names = [
    [run.workdir.name for run in group] for group in run_reader.group(found)
  ]
  assert names == [["2", "0"], ["1"], ["3"], ["4"]]
  keys = run_reader.varied_keys([run.config for run in found])
  assert keys == ["base_lr", "pretrained_path"]


@pytest.mark.parametrize("status", ["paused", ["finished"], None])
def test_an_unknown_status_is_damage(tmp_path, status):
  write(tmp_path / "a")
  (tmp_path / "a" / "result.json").write_text(json.dumps({"status": status}))
  with pytest.raises(errors.UserError, match="damaged .status is "):
    run_reader.read(tmp_path / "a")


@pytest.mark.parametrize(
  "line",
  ['"step"', "[1]", "7", '{"step"', "{}", '{"step": "2"}', '{"step": []}'],
)
def test_a_line_of_metrics_without_a_step_is_skipped(line):
  assert run_reader.parse_metrics([line, '{"step": 1}']) == [{"step": 1}]


def test_a_line_of_metrics_with_invalid_utf8_is_skipped(tmp_path):
  write(tmp_path / "a")
  (tmp_path / "a" / "metrics.jsonl").write_bytes(
    b'{"step": 1, "x": 1}\n\xff\xfe\n{"step": 2, "x": 3}\n'
  )
  assert run_reader.read(tmp_path / "a").curve("x") == ([1, 2], [1, 3])


@pytest.mark.parametrize("text", ["3", "null", "{}", '"ab"', "[1]", "["])
def test_class_names_that_are_no_list_of_names_are_damage(tmp_path, text):
  path = tmp_path / "class_names.json"
  path.write_text(text)
  with pytest.raises(errors.UserError) as caught:
    folder.check_class_names(tmp_path, ("a", "b"))
  assert re.fullmatch(rf"{path}: .*; delete it", str(caught.value))


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_runs_is_an_error(tmp_path, name):
  with pytest.raises(errors.UserError, match="no "):
    run_reader.find(tmp_path / name)
  with pytest.raises(errors.UserError, match="no run there"):
    run_reader.read(tmp_path / name)
