"""The norm-free study: runs, selection and statistics."""

import csv
import re
import shutil

import fake_runs
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax.report import lr_table
from rescalevit_jax.report import norm_free
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.sweep import outcome as outcome_lib

FINAL = "final-1500"
# Validation accuracy by method and learning rate, test accuracy by seed.
HELD_OUT = {("LN", 0.1): 0.30, ("LN", 0.2): 0.31, ("Cal", 0.1): 0.4}
TEST = {
  ("LN", 1): 0.32,
  ("LN", 2): 0.33,
  ("LN", 3): 0.34,
  ("Cal", 1): 0.41,
  ("Cal", 2): 0.43,
  ("Cal", 3): 0.42,
}


@pytest.fixture
def planned(monkeypatch):
  """Return the runs given to execution, which only writes their results.

  Runs with learning rate 9 or seed 9 diverge.
  """
  planned = []

  def execute(runs, runs_dir, *, jobs):
    outcome, left = outcome_lib.split_by_result(runs)
    diverged = [run for run, _ in outcome.failed]
    planned.extend(run for run in runs if run not in diverged)
    for run in left:
      config = run.config
      if 9 in (config.base_lr, config.seed):
        shutil.rmtree(run.workdir, ignore_errors=True)
        fake_runs.write(run.workdir, config_lib.flatten(config))
        result_lib.write(run.workdir, result_lib.diverged(3, "loss nan"))
        outcome.failed.append((run, "loss nan"))
        continue
      method, _, model = run.reference.rpartition(":")[2].partition(",")
      assert (config.model_name, model) in (
        ("ViT-XS_4", ""),
        ("ViT-B_32", "ViT-B_32"),
      )
      if config.data.num_val:
        accuracy = HELD_OUT.get((method, config.base_lr), 0.2)
      else:
        accuracy = TEST[method, config.seed]
      fake_runs.write(
        run.workdir,
        config_lib.flatten(config),
        {"last_accuracy": accuracy, "best_accuracy": 0.9},
      )
      outcome.done.append(run)
    return outcome

  monkeypatch.setattr(norm_free.execution, "execute", execute)
  return planned


def test_the_best_learning_rate_is_trained_and_compared(
  planned, tmp_path, capsys
):
  command = [
    "--methods=LN,Cal",
    "--datasets=cifar10",
    "--rates=0.1,0.2",
    f"--runs_dir={tmp_path}",
    "--config.batch_eval=500",
  ]
  for _ in range(2):  # All runs are finished the second time.
    assert norm_free.main(command) == 0
  configs = [run.config for run in planned[: len(planned) // 2]]
  choosing, final = configs[:4], configs[4:]
  assert {c.batch_eval for c in configs} == {500}
  for config in choosing:
    assert (config.data.num_val, config.total_steps) == (5000, 1500)
    assert config.eval_every == 1500  # Uses only the last accuracy.
  assert [(c.base_lr, c.seed) for c in final] == [
    (rate, seed) for rate in (0.2, 0.1) for seed in (1, 2, 3)
  ]
  for config in final:
    # One evaluation on the test images.
    assert config.eval_every == config.total_steps == 1500
    assert config.data.num_val == 0
  out, err = capsys.readouterr()
  assert (
    err.count("cifar10/LN: the best learning rate, 0.2, is at the edge") == 2
  )
  first, second = (tmp_path / FINAL / "table.md").read_text().splitlines()[2:]
  assert first == (
    "| cifar10 | LN | 0.2 | 0.1: 30.0, 0.2: 31.0 | 33.00 ± 1.00 (3) | – |"
    " – | – | – |"
  )
  # sqrt(1/3 + 1/3); 9 ± 2.776 * 0.8165 with 4 degrees of freedom.
  assert second == (
    "| cifar10 | Cal | 0.1 | 0.1: 40.0, 0.2: 20.0 | 42.00 ± 1.00 (3) |"
    " +9.00 ± 0.82 | +6.73 to +11.27 | 4e-04 | 4e-04 |"
  )
  assert second in out
  with open(tmp_path / FINAL / "accuracies.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  assert [row["phase"] for row in rows].count("final") == 6
  assert rows[0]["accuracy"] == "0.3"
  assert (tmp_path / FINAL / "accuracies.png").stat().st_size > 5000


def test_a_large_model_uses_the_original_recipe(planned, tmp_path):
  """Large models use a separate folder."""
  command = ["--methods=LN", "--datasets=cifar100", "--rates=0.2"]
  command += ["--model=ViT-B_32", "--steps=20000", "--final_steps=30000"]
  assert norm_free.main([*command, f"--runs_dir={tmp_path}"]) == 0
  choosing, *final = [run.config for run in planned]
  assert (choosing.image_size, choosing.warmup_steps) == (224, 500)
  assert [(c.dataset, c.total_steps) for c in final] == [
    ("cifar100", 30_000)
  ] * 3
  assert (tmp_path / "ViT-B_32" / "final-30000" / "table.md").is_file()


def test_only_requested_runs_are_used(planned, tmp_path):
  flags = ["--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert norm_free.main([*flags, "--methods=LN", "--rates=0.1,0.2"]) == 0
  small = ["--methods=LN", "--rates=0.1", "--seeds=1,3"]
  assert norm_free.main([*flags, *small]) == 0
  row = (tmp_path / FINAL / "table.md").read_text().splitlines()[2]
  assert row.startswith("| cifar10 | LN | 0.1 | 0.1: 30.0 | 33.00 ± 1.41 (2)")
  with open(tmp_path / FINAL / "accuracies.csv", newline="") as f:
    assert [row["seed"] for row in csv.DictReader(f)] == ["0", "1", "3"]


def test_diverged_runs_are_counted(planned, tmp_path, capsys):
  flags = ["--datasets=cifar10", f"--runs_dir={tmp_path}"]
  flags += ["--methods=LN,Cal", "--config.batch_eval=500"]
  assert norm_free.main([*flags, "--rates=0.1,9", "--seeds=1,3,9"]) == 0
  assert "edge of the grid" in capsys.readouterr().err
  table = (tmp_path / FINAL / "table.md").read_text().splitlines()[2:]
  assert table == [
    "| cifar10 | LN | 0.1 | 0.1: 30.0, 9: diverged | 33.00 ± 1.41 (2, 1"
    " diverged) | – | – | – | – |",
    # No difference, because it would compare only the surviving runs.
    "| cifar10 | Cal | 0.1 | 0.1: 40.0, 9: diverged | 41.50 ± 0.71 (2, 1"
    " diverged) | – | – | – | – |",
  ]
  with open(tmp_path / FINAL / "accuracies.csv", newline="") as f:
    rows = [(r["base_lr"], r["seed"], r["accuracy"]) for r in csv.DictReader(f)]
  assert ("9.0", "0", "") in rows and ("0.1", "9", "") in rows
  planned.clear()
  assert norm_free.main([*flags, "--rates=9"]) == 0
  table = (tmp_path / FINAL / "table.md").read_text().splitlines()[2:]
  assert table[0] == "| cifar10 | LN | – | 9: diverged | – | – | – | – | – |"
  assert not planned  # It would diverge again.
  assert norm_free.main([*flags, "--rates=9", "--config.batch=64"]) == 0
  assert [run.config.batch for run in planned] == [64, 64]


def test_runs_with_other_settings_are_an_error(planned, tmp_path, capsys):
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert norm_free.main([*flags, "--rates=0.1"]) == 0
  (tmp_path / FINAL / "table.md").unlink()
  assert norm_free.main([*flags, "--rates=0.1", "--config.batch=64"]) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert "another config: batch" in error
  assert norm_free.main([*flags, "--rates=0.1", "--num_val=400"]) == 1
  assert not (tmp_path / FINAL / "table.md").exists()


def test_a_learning_rate_is_not_rounded(planned, tmp_path):
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert norm_free.main([*flags, "--rates=0.1234567"]) == 0
  assert {run.config.base_lr for run in planned} == {0.1234567}


@pytest.mark.parametrize("phase", ["select", "final"])
@pytest.mark.parametrize(
  "end, code", [("stopped", 0), ("killed", 130), ("out of memory", 1)]
)
def test_unfinished_runs_write_no_table(
  end, code, phase, planned, tmp_path, monkeypatch, capsys
):
  """A failed run has no result, and no run starts after a signal."""
  whole = norm_free.execution.execute

  def execute(runs, *args, **kwargs):
    if phase not in str(runs[0].workdir):
      return whole(runs, *args, **kwargs)
    if end == "out of memory":
      first, *runs = runs
      first.workdir.mkdir(parents=True)
      (first.workdir / "log.txt").write_text("error: out of memory\n")
    outcome = whole(runs, *args, **kwargs)
    outcome.stopped, outcome.killed = end != "out of memory", end == "killed"
    return outcome

  monkeypatch.setattr(norm_free.execution, "execute", execute)
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert norm_free.main([*flags, "--rates=0.1,0.2"]) == code
  assert not (tmp_path / FINAL / "table.md").exists()
  if code == 1:
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{phase}-1500" in error and error.endswith(": out of memory")


@pytest.mark.slow
def test_a_study_with_real_runs(tmp_path):
  """On the digits, a huge learning rate diverges."""
  flags = ["--datasets=digits", "--methods=Cal", "--rates=0.1,1e38"]
  flags += ["--steps=4", "--final_steps=3", "--num_val=200", "--seeds=1"]
  flags += ["--jobs=2", f"--runs_dir={tmp_path}"]
  tiny = {
    "warmup_steps": 1,
    "batch": 32,
    "model.num_layers": 1,
    "model.hidden_size": 8,
    "model.mlp_dim": 8,
    "model.num_heads": 2,
  }
  flags += [f"--config.{key}={value}" for key, value in tiny.items()]
  assert norm_free.main(flags) == 0
  row = (tmp_path / "final-3" / "table.md").read_text().splitlines()[2]
  assert re.fullmatch(
    r"\| digits \| Cal \| 0\.1 \| 0\.1: [\d.]+, 1e\+38: diverged \|"
    r" [\d.]+ \(1\) \| – \| – \| – \| – \|",
    row,
  )


@pytest.mark.parametrize(
  "wrong", ["--methods=LN,Caal", "--seeds=a", "--rates=x"]
)
def test_invalid_values_are_errors_before_the_first_run(
  wrong, planned, tmp_path
):
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert norm_free.main([*flags, wrong]) == 1
  assert not planned


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--method=LN", "unknown argument --method=LN"),
    ("--config.seed=5", "the study sets seed itself"),
    ("--config.data.num_val=5", "the study sets data.num_val itself"),
    ("--config.model.residual=plain", "the study sets model.residual itself"),
    ("--config=nowhere.py", "nowhere.py: "),
    ("--config=configs/quickstart.py", "quickstart.py: has no METHODS"),
  ],
)
def test_invalid_arguments_are_errors(argument, words, capsys):
  assert norm_free.main([argument]) == 1
  assert words in capsys.readouterr().err


def test_numbers_must_be_positive(capsys):
  with pytest.raises(SystemExit):
    norm_free.main(["--num_val=0"])
  assert "'0' is not a whole number above 0" in capsys.readouterr().err


def test_plot_shows_the_accuracies():
  """The plot has one method with test runs and one without."""
  tuned_methods = [
    lr_table.TunedMethod(
      "a", "LN", "LN", {0.1: 0.3, 0.2: None}, 0.1, {1: 0.4, 2: 0.5}
    ),
    lr_table.TunedMethod("a", "Cal", "Cal", {0.1: 0.25, 0.2: 0.35}, 0.2),
  ]
  tuned_methods += [
    lr_table.TunedMethod("b", "LN-b", "LN", {0.1: 0.3}, 0.1),
    lr_table.TunedMethod("c", "LN-b", "LN", {0.1: 0.3}, 0.1),
    lr_table.TunedMethod("c", "LN", "LN", {0.1: 0.3}, 0.1),
  ]
  left, right, b, _, c, _ = lr_table.draw(tuned_methods).axes
  markers = [x.get_marker() for x in (*b.get_lines(), *c.get_lines())]
  assert markers == ["s", "s", "o"]  # Equal on each dataset.
  drawn = [list(zip(*x.get_data(), strict=True)) for x in left.get_lines()]
  assert drawn == [[(0.1, 30.0)], [(0.1, 25.0), (0.2, 35.0)]]
  assert [x.get_text() for x in right.get_yticklabels()] == ["LN (0.1)"]
  (mean,) = right.containers[0].lines[0].get_data()[0]
  assert mean == pytest.approx(45)
