"""The script that writes a run's weights as an `.npz`."""

import pathlib

import programs
import pytest
import trees

from rescalevit_jax import checkpoint
from rescalevit_jax import errors
from rescalevit_jax import pretrained


@pytest.fixture
def export(tmp_path, monkeypatch):
  """Runs the script on a run whose best and latest weights differ."""
  script = programs.load("export_npz")

  def load_variables(workdir, which):
    if pathlib.Path(workdir) != tmp_path / "run":
      raise errors.UserError(f"{workdir}: no checkpoint")
    return (*trees.fresh("BN", seed=["best", "latest"].index(which)), 7)

  monkeypatch.setattr(checkpoint, "load_variables", load_variables)

  def export(*flags, workdir="run"):
    return script.main(
      [f"--workdir={tmp_path / workdir}", f"--output={tmp_path / 'a.npz'}"]
      + list(flags)
    )

  return export


@pytest.mark.parametrize("which", ["best", "latest"])
def test_export(which, export, tmp_path, capsys):
  flags = () if which == "best" else ("--checkpoint=latest",)
  assert export(*flags) == 0
  params, stats, _ = pretrained.load(
    tmp_path / "a.npz", *trees.fresh("BN", seed=5)
  )
  trees.same(
    trees.flat(params, stats), trees.arrays("BN", seed=which == "latest")
  )
  out = capsys.readouterr().out
  assert which in out and "7" in out and "a.npz" in out


def test_fold_refuses_what_it_cannot_fold(export, tmp_path, capsys):
  assert export("--fold") == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "BN does not fold" in error
  assert not (tmp_path / "a.npz").exists()


def test_fold(export, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
    checkpoint, "load_variables", lambda *_: (*trees.fresh("Cal"), 7)
  )
  assert export("--fold") == 0
  _, _, report = pretrained.load(tmp_path / "a.npz", *trees.fresh("Identity"))
  assert not report.initial and not report.dropped
  assert "without its norm" in capsys.readouterr().out


def test_export_keeps_an_existing_file(export, tmp_path, capsys):
  path = tmp_path / "a.npz"
  path.write_bytes(b"precious")
  assert export() == 1
  assert path.read_bytes() == b"precious"
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "--overwrite" in error and str(path) in error
  assert export("--overwrite") == 0
  assert path.read_bytes() != b"precious"


def test_export_without_a_run(export, tmp_path, capsys):
  assert export(workdir="none") == 1
  captured = capsys.readouterr()
  assert captured.err.count("\n") == 1 and "no checkpoint" in captured.err
  assert not captured.out and not (tmp_path / "a.npz").exists()
