"""Two processes never work on one run."""

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

# Holds the lock until its standard input ends, in a folder.
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
  """Starts processes that hold the lock of tmp_path / 'run'."""
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


def test_another_process_is_named(holder, tmp_path):
  process = holder()
  with pytest.raises(errors.UserError) as e:
    with lock.hold(tmp_path / "run"):
      pass
  message = str(e.value)
  assert "another process works on this run" in message
  assert str(tmp_path / "run") in message and f" {process.pid})" in message
  assert "\n" not in message
  assert (tmp_path / "run" / ".lock").exists()  # Still the other's.
  process.stdin.close()
  process.wait()
  with lock.hold(tmp_path / "run"):
    pass


def test_training_takes_the_lock(holder, tiny_config, tmp_path):
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


def test_a_killed_process_holds_nothing(holder, tmp_path):
  process = holder("with a child")
  process.kill()
  process.wait()
  assert (tmp_path / "run" / ".lock").exists()
  with lock.hold(tmp_path / "run"):
    pass


def test_a_folder_without_a_run_does_not_stay(tmp_path):
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


def test_the_lock_of_a_deleted_file_counts_for_nothing(tmp_path, monkeypatch):
  """The last holder deletes the file between our opening and locking it."""
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


def test_a_file_system_without_locks(tmp_path, monkeypatch):
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


def test_a_full_disk_is_locked_too(tmp_path, monkeypatch):
  def write_text(path, text):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_text", write_text)
  with lock.hold(tmp_path):
    with pytest.raises(errors.UserError, match="unknown host"):
      with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["no such place", "deleted folder", "link"])
def test_a_folder_that_cannot_be_made_does_not_hang(
  kind, tmp_path, monkeypatch
):
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
  with lock.hold(workdir):  # There is no lock; the run says what is wrong.
    pass
