"""scripts/norm_free.py: what it runs, and its arithmetic."""

import csv
import subprocess

import fake_runs
import programs
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import sweep

# By data set, method, learning rate and seed: what the runs come to.
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
def study(monkeypatch):
  """Sweeps that only write what the runs would have left.

  With a learning rate of 9, runs fail.
  """
  module, planned = programs.load("norm_free"), []

  def run(command, check):
    assert not check and command[1:3] == ["-m", "rescalevit_jax.sweep"]
    failed = False
    for run in sweep.parse(command[3:])[1]:
      planned.append(run)
      config = run.config
      if config.base_lr == 9:
        failed = True
        continue
      method, _, model = run.reference.rpartition(":")[2].partition(",")
      assert (config.model_name, model) in (
        ("ViT-XS_4", ""),
        ("ViT-B_32", "ViT-B_32"),
      )
      seed = config.seed
      if config.data.held_out:
        accuracy = HELD_OUT.get((method, config.base_lr), 0.2)
      else:
        accuracy = TEST[method, seed]
      if not run.workdir.exists():
        fake_runs.write(
          run.workdir,
          config_lib.flatten(config),
          {"last_accuracy": accuracy, "best_accuracy": 0.9},
        )
    return subprocess.CompletedProcess(command, int(failed))

  monkeypatch.setattr(module.subprocess, "run", run)
  return module, planned


def test_the_best_rate_is_trained_and_compared(study, tmp_path, capsys):
  module, planned = study
  command = [
    "--methods=LN,Cal",
    "--datasets=cifar10",
    "--rates=0.1,0.2",
    "--final_steps=3000",
    f"--runs_dir={tmp_path}",
    "--config.batch_eval=500",
  ]
  for _ in range(2):  # The second time everything is there.
    assert module.main(command) == 0
  configs = [run.config for run in planned[: len(planned) // 2]]
  choosing, final = configs[:4], configs[4:]
  assert {c.batch_eval for c in configs} == {500}
  for config in choosing:
    assert (config.data.held_out, config.total_steps) == (5000, 1500)
  assert [(c.base_lr, c.seed) for c in final] == [
    (rate, seed) for rate in (0.2, 0.1) for seed in (1, 2, 3)
  ]
  for config in final:
    # The test images are looked at once.
    assert config.eval_every == config.total_steps == 3000
    assert config.data.held_out == 0
  out, err = capsys.readouterr()
  assert err.count("cifar10/LN: 0.2 is the best of these") == 2
  first, second = (tmp_path / "table.md").read_text().splitlines()[2:]
  assert first == (
    "| cifar10 | LN | 0.2 | 0.1: 30.0, 0.2: 31.0 | 33.00 ± 1.00 (3) | – | – |"
  )
  # sqrt(1/3 + 1/3); t = 9 / 0.8165 with 4 degrees of freedom.
  assert second == (
    "| cifar10 | Cal | 0.1 | 0.1: 40.0, 0.2: 20.0 | 42.00 ± 1.00 (3) |"
    " +9.00 ± 0.82 | 0.00039 |"
  )
  assert second in out
  with open(tmp_path / "accuracies.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  assert [row["phase"] for row in rows].count("final") == 6
  assert rows[0]["accuracy"] == "0.3"
  assert (tmp_path / "accuracies.png").stat().st_size > 5000


def test_a_large_model_has_the_original_recipe(study, tmp_path):
  module, planned = study
  command = ["--methods=LN", "--datasets=cifar100", "--rates=0.2"]
  command += ["--model=ViT-B_32", "--steps=20000", "--final_steps=20000"]
  assert module.main([*command, f"--runs_dir={tmp_path}"]) == 0
  choosing, *final = [run.config for run in planned]
  assert (choosing.image_size, choosing.warmup_steps) == (224, 500)
  assert [(c.dataset, c.total_steps) for c in final] == [
    ("cifar100", 20_000)
  ] * 3


def test_only_what_was_asked_for_counts(study, tmp_path):
  module, _ = study
  flags = ["--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert module.main([*flags, "--methods=LN", "--rates=0.1,0.2"]) == 0
  small = ["--methods=LN", "--rates=0.1", "--seeds=1,3"]
  assert module.main([*flags, *small]) == 0
  row = (tmp_path / "table.md").read_text().splitlines()[2]
  assert row.startswith("| cifar10 | LN | 0.1 | 0.1: 30.0 | 33.00 ± 1.41 (2)")
  with open(tmp_path / "accuracies.csv", newline="") as f:
    assert [row["seed"] for row in csv.DictReader(f)] == ["0", "1", "3"]


def test_a_learning_rate_that_fails_is_left_out(study, tmp_path, capsys):
  module, _ = study
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert module.main([*flags, "--rates=0.1,9"]) == 0
  row = (tmp_path / "table.md").read_text().splitlines()[2]
  assert row.startswith("| cifar10 | LN | 0.1 | 0.1: 30.0, 9: failed |")
  err = capsys.readouterr().err
  assert "left out" in err and "outermost" not in err
  assert module.main([*flags, "--rates=9"]) == 1
  assert "every learning rate failed" in capsys.readouterr().err


def test_a_learning_rate_is_not_rounded(study, tmp_path):
  module, planned = study
  flags = ["--methods=LN", "--datasets=cifar10", f"--runs_dir={tmp_path}"]
  assert module.main([*flags, "--rates=0.1234567"]) == 0
  assert {run.config.base_lr for run in planned} == {0.1234567}


def test_a_sweep_that_fails_ends_it(monkeypatch, tmp_path, capsys):
  module = programs.load("norm_free")
  monkeypatch.setattr(
    module.subprocess,
    "run",
    lambda command, check: subprocess.CompletedProcess(command, 130),
  )
  assert module.main([f"--runs_dir={tmp_path}"]) == 1
  assert "not finished; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--method=LN", "unknown argument --method=LN"),
    ("--config.seed=5", "the study sets seed itself"),
  ],
)
def test_arguments_that_do_not_do_are_named(argument, words, capsys):
  with pytest.raises(SystemExit):
    programs.load("norm_free").main([argument])
  assert words in capsys.readouterr().err
