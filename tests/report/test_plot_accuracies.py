"""Plots of a study's accuracies from its CSV file."""

import pytest

from rescalevit_jax.analysis import plot_block
from rescalevit_jax.report import lr_table
from rescalevit_jax.report import plot_accuracies

LN = lr_table.TunedMethod(
  "a", "LN", "LN", {0.1: 0.3, 0.2: None}, 0.1, {1: 0.5, 2: 0.7}
)
CAL = lr_table.TunedMethod("a", "Cal-x", "Cal", {}, 0.4, {1: 0.8})
VAL = lr_table.TunedMethod("a", "LN-val", "LN", {0.1: 0.3}, None)
OTHER = lr_table.TunedMethod("b", "LN", "LN", {}, 0.1, {1: 0.2})


@pytest.fixture
def table(tmp_path):
  path = tmp_path / "accuracies.csv"
  lr_table.write_csv([LN, CAL, VAL, OTHER], path)
  return path


def test_csv_of_the_study_is_read(table):
  assert plot_accuracies.read(table) == [LN, CAL, VAL, OTHER]


def test_best_validation_lr_is_chosen_among_tested_lrs(tmp_path):
  path = tmp_path / "accuracies.csv"
  row = "a,LN,{},{},{},{}\n".format
  path.write_text(
    "dataset,method,phase,base_lr,seed,accuracy\n"
    + row("select", 0.1, 0, 0.3)
    + row("select", 0.2, 0, 0.4)
    + row("select", 0.4, 0, 0.5)
    + row("final", 0.1, 1, 0.9)
    + row("final", 0.2, 1, 0.8)
  )
  (tuned,) = plot_accuracies.read(path)
  assert (tuned.lr, tuned.test_accuracy) == (0.2, {1: 0.8})


def test_bars_show_means_and_missing_methods():
  left, right = plot_accuracies.bars([LN, CAL, OTHER], {"LN": "LayerNorm"}).axes
  assert [x.get_width() for x in left.patches] == pytest.approx([60, 80])
  texts = [x.get_text().strip() for x in left.texts]
  assert texts == ["60.0 ± 14.1", "80.0 (1 seed)"]
  labels = [x.get_text() for x in left.get_yticklabels()]
  assert labels == ["LayerNorm", "Cal-x"]
  assert "not run" in [x.get_text().strip() for x in right.texts]


def test_diverged_runs_are_shown(tmp_path):
  path = tmp_path / "accuracies.csv"
  some = lr_table.TunedMethod("a", "DyT", "DyT", {}, 0.1, {1: 0.5, 2: None})
  none = lr_table.TunedMethod("a", "BN", "BN", {}, 0.1, {1: None, 2: None})
  other = lr_table.TunedMethod("b", "BN", "BN", {}, 0.1, {1: None})
  lr_table.write_csv([LN, some, none, other], path)
  methods = plot_accuracies.read(path)
  left, right = plot_accuracies.bars(methods, {}).axes
  texts = [x.get_text().strip() for x in left.texts]
  assert texts[1:] == ["50.0 (1 seed), 1 diverged", "2 diverged"]
  assert "1 diverged" in [x.get_text().strip() for x in right.texts]
  output = tmp_path / "table.md"
  command = [str(path), f"--output={output}"]
  for name in ("bars.png", "rates.png"):
    command.append(f"--output={tmp_path / name}")
  assert plot_accuracies.main(command) == 0
  assert plot_accuracies.main([*command, "--rates"]) == 0
  text = output.read_text()
  assert "(1, 1 diverged)" in text and "(0, 2 diverged)" in text


def test_equal_accuracies_have_a_deviation_of_zero():
  same = lr_table.TunedMethod("a", "LN", "LN", {}, 0.1, {1: 0.8, 2: 0.8})
  (axes,) = plot_accuracies.bars([same], {}).axes
  assert axes.texts[0].get_text().strip() == "80.0 ± 0.0"


@pytest.mark.parametrize("flags", [[], ["--rates"], ["--label=LN=LayerNorm"]])
def test_command_writes_a_picture(table, tmp_path, flags):
  output = tmp_path / "a.svg"
  assert plot_accuracies.main([str(table), f"--output={output}", *flags]) == 0
  assert output.stat().st_size > 3000


def test_command_writes_a_table(tmp_path):
  tuned_methods = [
    lr_table.TunedMethod(
      "a", method, "LN", {}, 0.1, dict(enumerate(accuracies))
    )
    for method, accuracies in (
      ("LN", [0.1, 0.2]),
      ("LN-x", [0.50, 0.52, 0.51]),
      ("LN-y", [0.55, 0.53, 0.54]),
      ("LN-z", [0.51, 0.50, 0.49]),
    )
  ]
  source, output = tmp_path / "accuracies.csv", tmp_path / "new" / "table.md"
  lr_table.write_csv(tuned_methods, source)
  argv = [str(source), f"--output={output}", "--reference=LN-x"]
  argv += [f"--label=LN-{x}={x}" for x in "xyz"]
  assert plot_accuracies.main(argv) == 0
  head, _, x, y, z = output.read_text().splitlines()
  assert "minus x, points" in head
  assert x.startswith("| a | x | 0.1 |") and x.endswith("| – | – | – | – |")
  # 3 and -1 ± 2.776 * 0.8165 with 4 degrees of freedom. The smaller p of the
  # two is doubled.
  assert y.endswith("+3.00 ± 0.82 | +0.73 to +5.27 | 0.021 | 0.043 |")
  assert z.endswith("-1.00 ± 0.82 | -3.27 to +1.27 | 0.288 | 0.288 |")


def test_no_picture_is_written_if_another_has_an_unknown_format(
  table, tmp_path, capsys
):
  outputs = [f"--output={tmp_path}/a.svg", f"--output={tmp_path}/a.gif"]
  for main, argv in (
    (plot_accuracies.main, [str(table)]),
    (plot_block.main, []),
  ):
    assert main([*argv, *outputs]) == 1
    assert "a.gif" in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
  "flag",
  [
    "--label=LayerNorm",
    "--label=DyT=tanh",
    "--reference=Cal",
    "--reference=LN-val",  # Has held-out accuracies only.
  ],
)
def test_wrong_methods_are_named(table, tmp_path, flag, capsys):
  argv = [str(table), f"--output={tmp_path / 'a.md'}", flag]
  assert plot_accuracies.main(argv) == 1
  assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
  "text",
  [
    "a,b\n1,2\n",
    "dataset,method,phase\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,0.1,3\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,0.1,3,nan\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,inf,3,0.5\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,0.1,3,0.5,1\n",
    f"dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,{'0' * 200_000}",
  ],
)
def test_other_files_are_refused(tmp_path, text, capsys):
  path = tmp_path / "other.csv"
  path.write_text(text)
  assert plot_accuracies.main([str(path), f"--output={tmp_path}/a.svg"]) == 1
  assert "accuracies.csv" in capsys.readouterr().err


def test_a_method_has_one_label(table, tmp_path, capsys):
  argv = [str(table), f"--output={tmp_path}/a.md"]
  assert plot_accuracies.main([*argv, "--label=LN=a", "--label=LN=b"]) == 1
  assert "two labels" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--rates"]])
def test_formulas_in_names_are_drawn_as_text(tmp_path, flags):
  names = r"$\foo$", r"LN-$\foo$"
  source, output = tmp_path / "a.csv", tmp_path / "a.png"
  tuned = lr_table.TunedMethod(*names, "LN", {0.1: 0.3}, 0.1, {1: 0.3})
  lr_table.write_csv([tuned], source)
  argv = [str(source), f"--output={output}", *flags]
  assert plot_accuracies.main(argv) == 0
  assert output.exists()
