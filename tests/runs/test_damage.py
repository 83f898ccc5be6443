"""A run resumes from its newest undamaged checkpoint and logs skipped ones."""

import itertools
import json
import logging
import os
import shutil

import interruption
import jax
import numpy as np
import program_cache
import pytest
import small_run

from rescalevit_jax import errors
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import checkpoint_folders
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.training import train


def _truncate(path):
  os.truncate(path, 0)


def _halve(path):
  os.truncate(path, path.stat().st_size // 2)


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 8
  path.write_bytes(content)


DAMAGES = (os.unlink, _truncate, _halve, _flip)


@pytest.fixture(scope="module", autouse=True)
def programs():
  with program_cache.shared():
    yield


@pytest.fixture(scope="module")
def whole(digits_dir, default_run, tmp_path_factory):
  """Return a folder with a finished run and one killed after step 11 of 12.

  The killed run has checkpoints of steps 4 and 8, and a best checkpoint.
  """
  folder = tmp_path_factory.mktemp("whole")
  config = small_run.config(digits_dir)
  (folder / "finished").symlink_to(default_run)
  with interruption.after_step(11):
    train.train_and_evaluate(config, folder / "killed")
  assert folder_lib.saved_steps(folder / "killed", "last") == [4, 8]
  return folder


@pytest.fixture
def killed(whole, tmp_path):
  """Return a copy of the killed run, to be damaged."""
  return shutil.copytree(whole / "killed", tmp_path / "killed")


def files_of(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def assert_finishes_like_uninterrupted(config, killed, whole):
  train.train_and_evaluate(config, killed)
  finished = whole / "finished"
  for name in ("metrics.jsonl", "config.json"):
    assert (killed / name).read_bytes() == (finished / name).read_bytes()
  results = [
    json.loads((folder / "result.json").read_text())
    for folder in (killed, finished)
  ]
  for result in results:
    del result["seconds"], result["images_per_second"]
  assert results[0] == results[1]
  for which in ("latest", "best"):
    a, b = (
      jax.tree.leaves(checkpoint.load_variables(folder, which))
      for folder in (killed, finished)
    )
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_damage_to_any_file_is_detected(killed, caplog, tmp_path):
  newest = killed / "checkpoints" / "last" / "8"
  spare = shutil.copytree(newest, tmp_path / "spare")
  unnoticed = set()
  for file, damage in zip(
    files_of(newest), itertools.cycle(DAMAGES), strict=False
  ):
    if not file.stat().st_size:
      damage = os.unlink
    damage(file)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      checkpoint_folders.move_damaged(killed)
    if folder_lib.saved_steps(killed, "last") == [4, 8]:
      unnoticed.add(file.name)
      shutil.rmtree(newest)
    else:
      assert folder_lib.saved_steps(killed, "last") == [4]
      assert str(newest) in caplog.text and "skipped" in caplog.text
    shutil.copytree(spare, newest)
  # These files have only times and versions.
  assert unnoticed <= {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize(
  "name, damage",
  [
    ("SHA256SUMS", _halve),
    ("_CHECKPOINT_METADATA", _flip),
    pytest.param("_CHECKPOINT_METADATA", os.unlink, marks=pytest.mark.slow),
    pytest.param("commit_success.txt", os.unlink, marks=pytest.mark.slow),
    pytest.param("progress/metadata", _truncate, marks=pytest.mark.slow),
  ],
)
def test_a_damaged_file_does_not_change_the_final_run(
  tiny_config, whole, killed, name, damage
):
  newest = killed / "checkpoints" / "last" / "8"
  damage(newest / name)
  assert_finishes_like_uninterrupted(tiny_config, killed, whole)


def test_a_file_in_place_of_a_checkpoint_is_skipped(tiny_config, whole, killed):
  newest = killed / "checkpoints" / "last" / "8"
  shutil.rmtree(newest)
  newest.write_text("")
  assert_finishes_like_uninterrupted(tiny_config, killed, whole)


def test_unfinished_checkpoint_is_deleted(tiny_config, whole, killed):
  folder = killed / "checkpoints" / "last"
  unfinished = folder / "12.orbax-checkpoint-tmp"
  shutil.copytree(folder / "8", unfinished)
  (unfinished / "SHA256SUMS").unlink()
  assert_finishes_like_uninterrupted(tiny_config, killed, whole)
  assert not unfinished.exists()


def test_damaged_checkpoints_are_kept_under_unique_names(
  tiny_config, whole, killed
):
  for _ in range(2):
    newest = killed / "checkpoints" / "last" / "8"
    _flip(files_of(newest / "variables")[0])
    checkpoint_folders.move_damaged(killed)
    shutil.copytree(whole / "killed" / "checkpoints" / "last" / "8", newest)
  names = {p.name for p in (killed / "checkpoints" / "damaged").iterdir()}
  assert names == {"last-8", "last-8-2"}


def test_damage_to_all_checkpoints_is_an_error(tiny_config, killed):
  for step in ("4", "8"):
    _flip(files_of(killed / "checkpoints" / "last" / step / "optimizer")[0])
  before = {p: p.read_bytes() for p in files_of(killed)}
  with pytest.raises(
    errors.UserError, match="last/8/.*last/4/.*all checkpoints of this run"
  ):
    train.train_and_evaluate(tiny_config, killed)
  assert {p: p.read_bytes() for p in files_of(killed)} == before


def test_damaged_best_checkpoint_is_skipped(tiny_config, whole, killed, caplog):
  (best,) = (killed / "checkpoints" / "best").iterdir()
  _flip(files_of(best / "variables")[0])
  with caplog.at_level(logging.WARNING):
    result = train.train_and_evaluate(tiny_config, killed)
  assert f"{best}/variables" in caplog.text and "skipped" in caplog.text
  lines = (killed / "metrics.jsonl").read_bytes()
  assert lines == (whole / "finished" / "metrics.jsonl").read_bytes()
  expected = json.loads((whole / "finished" / "result.json").read_text())
  assert result["best_accuracy"] == expected["best_accuracy"]
  assert result["best_step"] == expected["best_step"]
