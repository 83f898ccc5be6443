"""The lock of a run's folder."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from rescalevit_jax import errors
from rescalevit_jax.runs import lock
from rescalevit_jax.training import train
from rescalevit_jax.training import trainer

# Holds the lock of a folder until stdin is closed.
HOLDER = """
import subprocess, sys
from rescalevit_jax.runs import lock
with lock.hold(sys.argv[1]):
  if len(sys.argv) > 2:  # A program that outlives this one.
    subprocess.Popen(["sleep", "60"], close_fds=False)
  print("held", flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """Start processes that hold the lock of tmp_path / 'run'."""
  started = []

  def start(*args):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *args],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    started.append(process)
    assert process.stdout.readline() == "held\n"
    return process

  yield start
  for process in started:
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_process_that_holds_the_lock_is_named(holder, tmp_path):
  process = holder()
  with pytest.raises(errors.UserError) as e:
    with lock.hold(tmp_path / "run"):
      pass
  message = str(e.value)
  assert "another process works on this run" in message
  assert str(tmp_path / "run") in message and f" {process.pid})" in message
  assert "\n" not in message
  assert (tmp_path / "run" / ".lock").exists()  # Still held.
  process.stdin.close()
  process.wait()
  with lock.hold(tmp_path / "run"):
    pass


def test_training_refuses_a_locked_folder(holder, tiny_config, tmp_path):
  holder()
  with pytest.raises(errors.UserError, match="another process works on"):
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_training_holds_the_lock(tiny_config, tmp_path, monkeypatch):
  seen = []
  real = trainer.Trainer.run

  def run(self, stop):
    with pytest.raises(errors.UserError, match="another process"):
      with lock.hold(tmp_path / "run"):
        pass
    seen.append(True)
    return real(self, stop)

  monkeypatch.setattr(trainer.Trainer, "run", run)
  train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert seen
  assert not (tmp_path / "run" / ".lock").exists()


def test_a_killed_process_releases_the_lock(holder, tmp_path):
  process = holder("with a child")
  process.kill()
  process.wait()
  assert (tmp_path / "run" / ".lock").exists()
  with lock.hold(tmp_path / "run"):
    pass


def test_a_folder_created_for_the_lock_is_removed(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with lock.hold(tmp_path / "runs" / "new"):
      raise ZeroDivisionError
  assert not (tmp_path / "runs" / "new").exists()
  (tmp_path / "mine").mkdir()
  with lock.hold(tmp_path / "mine"):
    pass
  assert (tmp_path / "mine").exists() and not list(
    (tmp_path / "mine").iterdir()
  )


def test_the_lock_of_a_deleted_file_is_retaken(tmp_path, monkeypatch):
  """Another process deletes the file after we open it and before we lock it."""
  real, times = fcntl.flock, []

  def flock(descriptor, operation):
    if not times:
      (tmp_path / ".lock").unlink()
    times.append(None)
    return real(descriptor, operation)

  monkeypatch.setattr(fcntl, "flock", flock)
  with lock.hold(tmp_path):
    assert len(times) == 2
    with pytest.raises(errors.UserError):
      with lock.hold(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_an_error(tmp_path, monkeypatch):
  def flock(descriptor, operation):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  done = []
  with lock.hold(tmp_path / "run"):
    done.append(True)
  (tmp_path / "file").write_text("")
  with lock.hold(tmp_path / "file" / "run"):
    done.append(True)
  assert len(done) == 2
  assert not list(tmp_path.rglob(".lock"))


def test_lock_is_held_on_a_full_disk(tmp_path, monkeypatch):
  def write_text(path, text):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_text", write_text)
  with lock.hold(tmp_path):
    with pytest.raises(errors.UserError, match="unknown host"):
      with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["no such place", "deleted folder", "link"])
def test_an_unusable_folder_does_not_hang(kind, tmp_path, monkeypatch):
  workdir = {
    "no such place": "/proc/nothing",
    "deleted folder": "runs/a",
    "link": str(tmp_path / "run"),
  }[kind]
  if kind == "deleted folder":
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
  if kind == "link":
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "missing" / "file")
  with lock.hold(workdir):  # No lock is taken; the run reports the error.
    pass
