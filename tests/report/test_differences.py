"""Tests of differences between norms, against scipy and hand computations."""

import math

import fake_runs
import numpy as np
import pytest
from scipy import stats

from rescalevit_jax.report import command_line
from rescalevit_jax.report import differences
from rescalevit_jax.report import latex
from rescalevit_jax.report import run_groups

LN = [0.50, 0.52, 0.51]
BN = [0.45, 0.48, 0.46]


def write(root, norm, accuracies, seeds):
  for seed, accuracy in zip(seeds, accuracies, strict=True):
    changes = {"model.norm": norm, "seed": seed, "dataset": "digits"}
    result = fake_runs.RESULT | {"last_accuracy": accuracy}
    fake_runs.write(root / f"{norm}-{seed}", changes, result)


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


def test_other_seeds_are_compared_by_welch(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN[:2], (7, 8))
  (found,) = compare(tmp_path)
  a, b = 100 * np.array(BN[:2]), 100 * np.array(LN)
  expected = stats.ttest_ind(a, b, equal_var=False)
  assert found.test == "Welch, 2 and 3 runs"
  assert found.p == pytest.approx(expected.pvalue)


def test_single_runs_are_not_compared(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  write(tmp_path, "BN", BN[:1], [0])
  assert compare(tmp_path) == []


def test_other_settings_are_not_mixed(tmp_path):
  write(tmp_path, "LN", LN, range(3))
  for seed in range(2):
    changes = {"model.norm": "BN", "seed": seed, "dataset": "cifar10"}
    fake_runs.write(tmp_path / f"x{seed}", changes, fake_runs.RESULT)
  assert compare(tmp_path) == []


def test_holm_by_hand():
  """0.01 * 4, 0.02 * 3, then never less than before; nan does not count."""
  found = differences.holm([0.02, 0.01, 0.9, math.nan, 0.03])
  np.testing.assert_allclose(found, [0.06, 0.04, 0.9, math.nan, 0.06])
  assert differences.holm([0.6, 0.7]) == [1.0, 1.0]
  assert differences.holm([]) == []


def test_the_report_shows_them(tmp_path):
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
