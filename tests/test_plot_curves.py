"""The program that draws curves."""

import programs
import pytest

plot_curves = programs.load("plot_curves")


def test_draws_all_runs_of_a_folder(tiny_run, tmp_path, capsys):
  outputs = [tmp_path / "new" / "a.png", tmp_path / "a.svg"]
  flags = [f"--output={path}" for path in outputs]
  assert plot_curves.main([f"--workdir={tiny_run}", *flags]) == 0
  assert all(path.stat().st_size > 5000 for path in outputs)
  assert capsys.readouterr().out == "".join(f"{p}: 1 run\n" for p in outputs)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--workdir=nowhere"], "no such folder"),
    (["--workdir={run}", "--output=a.jpeg"], ".png or .svg"),
    (["--workdir={run}", "--published=nowhere.csv"], "nowhere.csv"),
  ],
)
def test_mistakes_are_one_line(flags, words, tiny_run, capsys):
  flags = [flag.format(run=tiny_run) for flag in flags]
  assert plot_curves.main(flags) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and words in line
