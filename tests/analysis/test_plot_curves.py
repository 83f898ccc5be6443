"""The command that plots training curves."""

import pytest

from rescalevit_jax.analysis import plot_curves


def test_all_runs_of_a_folder_are_drawn(tiny_run, tmp_path, capsys):
  outputs = [tmp_path / "new" / "a.png", tmp_path / "a.svg"]
  flags = [f"--output={path}" for path in outputs]
  assert plot_curves.main([f"--workdir={tiny_run}", *flags]) == 0
  assert all(path.stat().st_size > 5000 for path in outputs)
  assert capsys.readouterr().out == "".join(f"{p}: 1 run\n" for p in outputs)


def test_a_run_named_twice_is_drawn_once(tiny_run, tmp_path, capsys):
  flags = [f"--workdir={tiny_run}", f"--workdir={tiny_run.parent}/./tiny_run"]
  assert plot_curves.main([*flags, f"--output={tmp_path / 'a.png'}"]) == 0
  assert capsys.readouterr().out.endswith("a.png: 1 run\n")


def test_nothing_is_drawn_if_an_output_is_invalid(tiny_run, tmp_path):
  outputs = [f"--output={tmp_path / name}" for name in ("a.png", "a.PDF")]
  assert plot_curves.main([f"--workdir={tiny_run}", *outputs]) == 1
  assert not any(tmp_path.iterdir())


def test_keyboard_interrupt_is_one_line(tiny_run, monkeypatch, capsys):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(plot_curves.run_reader, "find_each", interrupt)
  assert plot_curves.main([f"--workdir={tiny_run}"]) == 130
  assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--workdir=nowhere"], "no such folder"),
    (["--workdir={run}", "--output=a.jpeg"], ".png or .svg"),
  ],
)
def test_errors_are_one_line(flags, words, tiny_run, capsys):
  flags = [flag.format(run=tiny_run) for flag in flags]
  assert plot_curves.main(flags) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and words in line
