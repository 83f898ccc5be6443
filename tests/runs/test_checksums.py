"""Checksums of a folder's files."""

import os

import pytest

from rescalevit_jax import errors
from rescalevit_jax.runs import checksums


def refuses(folder, words):
  with pytest.raises(errors.UserError, match=words):
    checksums.verify(folder)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "b").write_bytes(b"content")
  checksums.write(tmp_path)
  checksums.verify(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  "name, words",
  [
    ("\0", "null"),
    ("loop", "loop|too many levels"),
    ("pipe", "not a file"),
    ("a", "not a file"),
    ("../outside", "in another folder"),
    ("missing", "No such file"),
  ],
)
def test_names_of_other_things_are_refused(folder, name, words):
  (folder / "loop").symlink_to("loop")
  os.mkfifo(folder / "pipe")
  (folder / checksums.NAME).write_text(f"{64 * '0'}  {name}\n")
  refuses(folder, f"(?i){words}")


def test_a_pipe_with_checksums_is_refused(folder):
  (folder / checksums.NAME).unlink()
  os.mkfifo(folder / checksums.NAME)
  refuses(folder, "missing or damaged")


def test_a_changed_file_is_refused(folder):
  (folder / "a" / "b").write_bytes(b"changed")
  refuses(folder, "its SHA-256 differs")
