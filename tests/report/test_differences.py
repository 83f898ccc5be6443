"""Significance of differences between norms, against scipy and by hand."""

import math
import shutil

import fake_runs
import numpy as np
import pytest
from scipy import stats

from rescalevit_jax.report import command_line
from rescalevit_jax.report import differences
from rescalevit_jax.report import latex
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import result as result_lib

LN = [0.50, 0.52, 0.51]
BN = [0.45, 0.48, 0.46]


def write(root, norm, accuracies, seeds, image_size=32):
  for seed, accuracy in zip(seeds, accuracies, strict=True):
    changes = {"model.norm": norm, "seed": seed, "dataset": "digits"}
    changes["image_size"] = image_size
    result = fake_runs.RESULT | {"last_accuracy": accuracy}
    fake_runs.write(root / f"{norm}-{seed}-{image_size}", changes, result)


def compare(root):
  return differences.compare(run_groups.collect(root))


def test_shared_seeds_are_paired(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN, range(3))
  (found,) = compare(tmp_path)
  expected = stats.ttest_rel(100 * np.array(BN), 100 * np.array(LN))
  assert found.norm == "BN" and found.test == "paired, 3 seeds"
  assert found.points == pytest.approx(100 * (np.mean(BN) - np.mean(LN)))
  assert found.p == found.adjusted_p == pytest.approx(expected.pvalue)
  assert found.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_different_seeds_use_welchs_test(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN[:2], (7, 8))
  (found,) = compare(tmp_path)
  a, b = 100 * np.array(BN[:2]), 100 * np.array(LN)
  expected = stats.ttest_ind(a, b, equal_var=False)
  assert found.test == "Welch, 2 and 3 seeds"
  assert found.p == pytest.approx(expected.pvalue)


def test_single_runs_are_not_compared(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN[:1], [0])
  assert compare(tmp_path) == []


def test_runs_of_one_seed_count_once(tmp_path):
  for folder, shift in ("a", 0.01), ("b", -0.01):
    write(tmp_path / folder, "LN", [x + shift for x in LN], range(3))
  write(tmp_path, "BN", BN, range(3))
  (found,) = compare(tmp_path)
  assert found.test == "paired, 3 seeds"
  expected = stats.ttest_rel(100 * np.array(BN), 100 * np.array(LN))
  assert found.p == pytest.approx(expected.pvalue)


def test_one_seed_is_not_compared_even_if_run_twice(tmp_path):
  for folder in "ab":
    write(tmp_path / folder, "LN", LN[:1], [0])
    write(tmp_path / folder, "BN", BN[:1], [0])
  assert compare(tmp_path) == []


def test_runs_with_other_settings_are_not_compared(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  for seed in range(2):
    changes = {"model.norm": "BN", "seed": seed, "dataset": "cifar10"}
    fake_runs.write(tmp_path / f"x{seed}", changes, fake_runs.RESULT)
  assert compare(tmp_path) == []


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_norms_with_diverged_runs_are_not_tested(norm, tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN, range(3))
  shutil.copytree(tmp_path / f"{norm}-0-32", tmp_path / "bad")
  result_lib.write(tmp_path / "bad", result_lib.diverged(7, "loss nan"))
  study = run_groups.collect(tmp_path)
  (found,) = differences.compare(study)
  reason = f"none, diverged: 1 of {norm}"
  assert found.test == reason and math.isnan(found.p)
  assert differences.table(study)[2][0][2:5] == ["–", "–", reason]
  rows = {row["norm"]: row for row in tables.rows(study)}
  assert rows[norm]["diverged"] == 1 and rows[norm]["runs"] == 3
  cells = tables.cells(tables.columns(study), tables.rows(study))[2]
  assert sum("3 (1 diverged)" in row for row in cells) == 1


def test_resolutions_are_not_compared(tmp_path):
  for size, theirs, ours in ((32, LN, BN), (64, BN, LN)):
    write(tmp_path, "LN", theirs, range(3), size)
    write(tmp_path, "BN", ours, range(3), size)
  small, large = compare(tmp_path)
  assert small.points == pytest.approx(-large.points) != 0
  assert "32 pixels" in small.setting and "64 pixels" in large.setting


@pytest.mark.parametrize("seeds", [(0, 1), (7, 8)])
def test_differences_without_variance_have_no_p_value(seeds, tmp_path):
  """Equal differences of 1/360 vary only by rounding."""
  write(tmp_path, "LN", [300 / 360] * 2, (0, 1))
  write(tmp_path, "BN", [299 / 360] * 2, seeds)
  write(tmp_path, "GN", [299 / 360, 290 / 360], (0, 1))
  constant, other = compare(tmp_path)
  assert constant.norm == "BN" and constant.points < 0
  assert math.isnan(constant.p) and math.isnan(constant.interval[0])
  assert other.adjusted_p == other.p > 0.01


def test_holm_correction_by_hand():
  """Sorted p-values are multiplied by 4, 3, ...; nan is ignored."""
  found = differences.holm([0.02, 0.01, 0.9, math.nan, 0.03])
  np.testing.assert_allclose(found, [0.06, 0.04, 0.9, math.nan, 0.06])
  assert differences.holm([0.6, 0.7]) == [1.0, 1.0]
  assert differences.holm([]) == []


def test_report_shows_differences(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN, range(3))
  assert command_line.main([str(tmp_path), "--no_attention"]) == 0
  for name in ("report.md", "report.html", "report.tex"):
    assert "paired, 3 seeds" in (tmp_path / name).read_text(), name
  tex = (tmp_path / "report.tex").read_text()
  assert tex.count("\\begin{tabular}") == tex.count("\\bottomrule") == 2
  for line in tex.splitlines():
    assert line.count(" & ") in (0, 6) or "norm" in line or "digits" in line


def test_latex_is_escaped():
  found = latex.table("lr", ["a_b", "50 %"], [["x & y", "1 ± 2"]])
  assert r"a\_b & 50 \% \\" in found
  assert r"x \& y & 1 $\pm$ 2 \\" in found
