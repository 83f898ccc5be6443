"""Runs survive disk, clock and lock faults, or fail with a one-line error."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import signal
import subprocess

import paths
import pytest
import tiny_sweep
import trials

# Code that processes run at startup.
NO_LOCKS = """
import fcntl
def flock(descriptor, operation):
  raise OSError({}, "no locks here")
fcntl.flock = flock
"""
# Killed after a file is written, before it is renamed.
KILLED_WRITING = """
import os, signal
def replace(source, target, replace=os.replace):
  if os.path.basename(target) == {!r}:
    os.kill(os.getpid(), signal.SIGKILL)
  replace(source, target)
os.replace = replace
"""
# Set the clock back by one day per byte of a file.
CLOCK = """
import os, time
def turned(clock, day):
  return lambda: clock() - day * os.path.getsize({!r})
time.time = turned(time.time, 86400)
time.time_ns = turned(time.time_ns, 86400 * 10**9)
"""


@pytest.fixture(scope="module")
def whole(digits_dir, tmp_path_factory):
  """Return an uninterrupted run."""
  folder = tmp_path_factory.mktemp("whole")
  keys = (*trials.KEYS, "model.norm=BN", f"tfds_data_dir={digits_dir}")
  env = tiny_sweep.environment(folder)
  trial = trials.Trial(folder / "run", folder / "log", keys, env)
  trial.finish()
  return trial


@pytest.fixture
def trial(whole, tmp_path):
  """Return the same run, unstarted, below a mount point."""
  (tmp_path / "disk").mkdir()
  return dataclasses.replace(
    whole, workdir=tmp_path / "disk" / "run", log=tmp_path / "log"
  )


@pytest.fixture
def mount(tmp_path):
  """Return a function that mounts a file system above the run."""
  disk = tmp_path / "disk"

  def run(*args):
    done = subprocess.run(
      ["mount", *args, disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
      pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

  yield run
  subprocess.run(["umount", "--lazy", disk], check=False, capture_output=True)


@contextlib.contextmanager
def frozen(trial, process, lines):
  """Stop a process after a number of lines of metrics; resume it on exit."""
  trial.wait_for_lines(lines, process)
  assert trials.freeze(process), trial.said()
  try:
    yield
  finally:
    process.send_signal(signal.SIGCONT)


def kill(process):
  process.kill()
  process.wait()


def fill(disk: pathlib.Path, room: int = 0) -> pathlib.Path:
  """Fill a disk except for `room` bytes; return the file to delete."""
  path = disk / "filler"
  with open(path, "wb", buffering=0) as f:
    with contextlib.suppress(OSError):
      while f.write(bytes(4096)):
        pass
    os.truncate(path, max(0, path.stat().st_size - room))
  return path


def sitecustomize(folder, code, env):
  """Return environment variables that make Python run code at startup."""
  folder.mkdir()
  (folder / "sitecustomize.py").write_text(code)
  return {"PYTHONPATH": os.pathsep.join([str(folder), env["PYTHONPATH"]])}


@pytest.mark.parametrize(
  "name",
  ["metrics.jsonl", pytest.param("result.json", marks=pytest.mark.slow)],
)
def test_run_resumes_after_a_kill_during_a_write(trial, whole, tmp_path, name):
  process = trial.fork()
  with frozen(trial, process, 10):
    kill(process)
  code = KILLED_WRITING.format(name)
  process = trial.start(**sitecustomize(tmp_path / "site", code, trial.env))
  assert process.wait() == -signal.SIGKILL, trial.said()
  trials.check_sane(trial, whole)
  trial.finish()
  trials.check_same(trial, whole)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 65536])
def test_disk_full_at_start_is_reported(trial, whole, mount, room):
  mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
  filler = fill(trial.workdir.parent, room)
  assert "No space left" in trial.fail()
  trials.check_sane(trial, whole)
  filler.unlink()
  trial.finish()
  trials.check_same(trial, whole)


@pytest.mark.parametrize(
  "lines", [10, pytest.param(32, marks=pytest.mark.slow)]
)
def test_run_resumes_after_the_disk_fills_up(trial, whole, mount, lines):
  """After 32 lines, only the last checkpoint and result.json are missing."""
  mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
  process = trial.fork()
  with frozen(trial, process, lines):
    filler = fill(trial.workdir.parent)
  assert "No space left" in trial.error(process)
  trials.check_sane(trial, whole)
  assert "No space left" in trial.fail()
  trials.check_sane(trial, whole)
  filler.unlink()
  trial.finish()
  trials.check_same(trial, whole)


@pytest.mark.slow
def test_read_only_disk_at_start_is_reported(trial, whole, mount):
  mount("-t", "tmpfs", "-o", "ro", "tmpfs")
  assert "Read-only file system" in trial.fail()
  mount("-o", "remount,rw")
  process = trial.fork()
  trial.wait_for_lines(10, process)
  kill(process)
  mount("-o", "remount,ro")
  assert "Read-only file system" in trial.fail()
  trials.check_sane(trial, whole)
  mount("-o", "remount,rw")
  trial.finish()
  trials.check_same(trial, whole)


def test_run_resumes_after_disk_turns_read_only(trial, whole, mount, tmp_path):
  """ext4 becomes read-only after an error and loses unwritten data."""
  image = tmp_path / "image"
  with open(image, "wb") as f:
    f.truncate(16 * 2**20)
  try:
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
  except (OSError, subprocess.CalledProcessError) as e:
    pytest.skip(f"no ext4 here: {e}")
  mount("-o", "loop", image)
  process = trial.fork()
  with frozen(trial, process, 10):
    mount("-o", "remount,abort")
  message = trial.error(process)
  # A write that is under way fails with EIO.
  reasons = ("Read-only file system", "Input/output error")
  assert any(reason in message for reason in reasons), message
  assert ".lock" not in message
  subprocess.run(["umount", trial.workdir.parent], check=True)
  mount("-o", "loop", image)
  trials.check_sane(trial, whole)
  trial.finish()
  trials.check_same(trial, whole)


@pytest.mark.slow
def test_run_without_file_locks_finishes(trial, whole, tmp_path):
  code = NO_LOCKS.format(errno.ENOLCK)
  process = trial.start(**sitecustomize(tmp_path / "site", code, trial.env))
  assert process.wait() == 0, trial.said()
  trials.check_same(trial, whole)


@pytest.mark.slow
def test_unwritable_event_files_do_not_stop_a_run(trial, whole):
  env = {"PYTHONPATH": str(paths.ROOT)}  # Makes TensorFlow available.
  process = trial.start(**env)
  with frozen(trial, process, 5):
    for path in trial.workdir.glob("events.out.tfevents*"):
      done = subprocess.run(
        ["chattr", "+i", path], capture_output=True, text=True, check=False
      )
  try:
    if done.returncode:
      pytest.skip(f"no file can be made immutable here: {done.stderr.strip()}")
    assert process.wait() == 0, trial.said()
    assert trial.said().count("TensorBoard: no further files") == 1
    trials.check_same(trial, whole)
  finally:
    kill(process)
    subprocess.run(["chattr", "-i", path], check=False, capture_output=True)


@pytest.mark.slow
def test_clock_set_back_does_not_change_a_run(trial, whole, tmp_path):
  days = tmp_path / "days"
  days.write_text("")
  env = sitecustomize(tmp_path / "site", CLOCK.format(str(days)), trial.env)
  process = trial.start(**env)
  with frozen(trial, process, 10):
    days.write_text("1")
  trial.wait_for_lines(20, process)
  kill(process)
  days.write_text("12")
  process = trial.start(**env)
  assert process.wait() == 0, trial.said()
  trials.check_same(trial, whole)


def test_second_process_on_a_run_is_refused(trial, whole, tmp_path):
  first = trial.fork()
  second = dataclasses.replace(trial, log=tmp_path / "second")
  with frozen(trial, first, 5):
    message = second.fail()
  assert "another process works on this run" in message
  assert f"process {first.pid})" in message
  assert first.wait() == 0, trial.said()
  trials.check_same(trial, whole)


@pytest.mark.slow
def test_truncated_compilation_cache_is_ignored(trial, whole, tmp_path):
  compiled = tmp_path / "compiled"
  shutil.copytree(trial.env["JAX_COMPILATION_CACHE_DIR"], compiled)
  for path in compiled.iterdir():  # A kill truncates a file in this way.
    os.truncate(path, path.stat().st_size // 2)
  process = trial.start(JAX_COMPILATION_CACHE_DIR=str(compiled))
  assert process.wait() == 0, trial.said()
  trials.check_same(trial, whole)
