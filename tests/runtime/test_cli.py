"""Arguments and process setup shared by all commands."""

import argparse
import os
import subprocess
import sys

import paths
from PIL import Image
import pytest

from rescalevit_jax import errors
from rescalevit_jax import main
from rescalevit_jax.runtime import cli


def test_the_home_folder_is_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  argv = ["~/cat.png", "--workdir=~/runs/a", "--config.pretrained_path=~/a.npz"]
  argv += ["--grid", "base_lr=0.1", "--output", "~/b"]
  assert cli.arguments(argv) == [
    "/home/me/cat.png",
    "--workdir=/home/me/runs/a",
    "--config.pretrained_path=/home/me/a.npz",
    "--grid",
    "base_lr=0.1",
    "--output",
    "/home/me/b",
  ]


@pytest.mark.parametrize(
  "argv",
  [
    ["--workdir=gs://bucket/a"],
    ["--runs_dir", "s3://bucket"],
    ["--config.pretrained_path=https://host/a.npz"],
  ],
)
@pytest.mark.parametrize("parse", [cli.arguments, main.parse])
def test_a_url_is_refused_in_one_line(argv, parse, capsys):
  with pytest.raises(SystemExit) as caught:
    parse(["main", *argv])
  assert caught.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert argv[-1].split("=")[-1] in line and "URL" in line


@pytest.mark.parametrize("text", ["7", "1_00", "007", "-1", "1__0", "1.0", ""])
def test_flags_and_config_keys_accept_the_same_integers(text):
  argv = ["main", "--config=configs/quickstart.py", f"--config.seed={text}"]
  try:
    expected = main.parse(argv).seed
  except SystemExit:
    expected = None
  for parse in (cli.index, cli.positive):
    try:
      found = parse(text)
    except argparse.ArgumentTypeError as e:
      assert repr(text) in str(e)
      found = None
    assert found == expected


def fail(*_):
  raise errors.UserError("a: is wrong; correct it")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("body, code", [(fail, 1), (print, 0)])
@pytest.mark.parametrize("command", [cli.run, main.main])
def test_a_closed_stream_is_no_error(
  command, body, code, stream, monkeypatch, capfd
):
  """Python sets sys.stdout to None after `>&-`."""
  monkeypatch.setattr(sys, stream, None)
  monkeypatch.setattr(main, "_run", body)
  monkeypatch.setattr(os, "_exit", sys.exit)
  if command is main.main and code:
    with pytest.raises(SystemExit, match=str(code)):
      command(None)
  else:
    assert (command(body) or 0) == code
  out, err = capfd.readouterr()
  assert "error" not in out and ("error" in err) == (
    code == 1 and stream == "stdout"
  )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed, tmp_path):
  """Libraries print to descriptors 1 and 2, whatever they are."""
  program = (
    "import os; from rescalevit_jax.runtime import cli; cli.arguments([])\n"
    f"f = open({str(tmp_path / 'a')!r}, 'w'); f.write(str(f.fileno()))\n"
  )
  subprocess.run(
    ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, program],
    env=os.environ | {"PYTHONPATH": str(paths.ROOT)},
    check=True,
  )
  assert int((tmp_path / "a").read_text()) > 2


def test_a_full_stderr_keeps_the_exit_code(monkeypatch):
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stderr", full)
    assert cli.fail("interrupted", 130) == 130
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_broken_stdout_pipe_exits_silently(monkeypatch, capfd):
  """As in `| true`; the last lines are in Python's buffer."""
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as stdout:
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.run(print) == 1
  assert capfd.readouterr().err == ""


COMMANDS = {
  "main": ["--config=configs/quickstart.py", "--workdir={tmp}/run"],
  "predict": ["--workdir={run}", "{tmp}/a.png"],
  "analysis.plot_attention": ["--workdir={run}", "--output={tmp}/out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_device_is_one_line(name, tiny_run, tmp_path):
  """JAX raises an AssertionError without a message for a missing device."""
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  flags = [x.format(tmp=tmp_path, run=tiny_run) for x in COMMANDS[name]]
  done = subprocess.run(
    [sys.executable, "-m", f"rescalevit_jax.{name}", *flags],
    env=os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(paths.ROOT)},
    cwd=paths.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1 and "JAX_PLATFORMS (cuda)" in lines[0], done.stderr
  assert "Traceback" not in done.stderr


def test_plots_ignore_the_matplotlib_backend_of_the_user(tiny_run, tmp_path):
  path = tmp_path / "curves.png"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "rescalevit_jax.analysis.plot_curves"),
      *(f"--workdir={tiny_run}", f"--output={path}"),
    ],
    env=os.environ
    | {"MPLBACKEND": "module://nowhere.backend", "PYTHONPATH": str(paths.ROOT)},
    cwd=paths.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert path.exists()
