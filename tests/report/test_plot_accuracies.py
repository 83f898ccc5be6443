"""Pictures of a study's accuracies, from its CSV file."""

import pytest

from rescalevit_jax.analysis import plot_block
from rescalevit_jax.report import lr_table
from rescalevit_jax.report import plot_accuracies

LN = lr_table.Outcome(
  "a", "LN", "LN", {0.1: 0.3, 0.2: None}, 0.1, {1: 0.5, 2: 0.7}
)
CAL = lr_table.Outcome("a", "Cal-x", "Cal", {}, 0.4, {1: 0.8})
OTHER = lr_table.Outcome("b", "LN", "LN", {}, 0.1, {1: 0.2})


@pytest.fixture
def table(tmp_path):
  path = tmp_path / "accuracies.csv"
  lr_table.write_csv([LN, CAL, OTHER], path)
  return path


def test_reads_the_file_that_the_study_writes(table):
  assert plot_accuracies.read(table) == [LN, CAL, OTHER]


def test_best_held_out_lr_counts_among_those_tested(tmp_path):
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
  (outcome,) = plot_accuracies.read(path)
  assert (outcome.lr, outcome.test_accuracy) == (0.2, {1: 0.8})


def test_bars_show_means_and_missing_methods():
  left, right = plot_accuracies.bars([LN, CAL, OTHER], {"LN": "LayerNorm"}).axes
  assert [x.get_width() for x in left.patches] == pytest.approx([60, 80])
  texts = [x.get_text().strip() for x in left.texts]
  assert texts == ["60.0 ± 14.1", "80.0 (1 seed)"]
  labels = [x.get_text() for x in left.get_yticklabels()]
  assert labels == ["LayerNorm", "Cal-x"]
  assert "not run" in [x.get_text().strip() for x in right.texts]


def test_equal_seeds_are_not_one_seed():
  same = lr_table.Outcome("a", "LN", "LN", {}, 0.1, {1: 0.8, 2: 0.8})
  (axes,) = plot_accuracies.bars([same], {}).axes
  assert axes.texts[0].get_text().strip() == "80.0 ± 0.0"


@pytest.mark.parametrize("flags", [[], ["--rates"], ["--label=LN=LayerNorm"]])
def test_command_writes_a_picture(table, tmp_path, flags):
  output = tmp_path / "a.svg"
  assert plot_accuracies.main([str(table), f"--output={output}", *flags]) == 0
  assert output.stat().st_size > 3000


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


@pytest.mark.parametrize("label", ["LayerNorm", "DyT=tanh"])
def test_wrong_labels_are_named(table, tmp_path, label, capsys):
  argv = [str(table), f"--output={tmp_path / 'a.svg'}", f"--label={label}"]
  assert plot_accuracies.main(argv) == 1
  assert "--label" in capsys.readouterr().err


@pytest.mark.parametrize(
  "text",
  [
    "a,b\n1,2\n",
    "dataset,method,phase\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final,0.1,3\n",
    "dataset,method,phase,base_lr,seed,accuracy\nd,LN,final\n",
  ],
)
def test_other_files_are_refused(tmp_path, text, capsys):
  path = tmp_path / "other.csv"
  path.write_text(text)
  assert plot_accuracies.main([str(path), f"--output={tmp_path}/a.svg"]) == 1
  assert "accuracies.csv" in capsys.readouterr().err
