"""Statistics and format of the tables."""

import csv
import io
import runpy

import fake_runs
import paths
import pytest
from scipy import stats

from rescalevit_jax import config as config_lib
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.report import notes
from rescalevit_jax.report import run_groups
from rescalevit_jax.report import tables
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.runtime import markdown

# Published ViT-B_32 with LN on cifar10: best 67.56, last 67.47.
PUBLISHED = {"model_name": "ViT-B_32"}


def read(text):
  return list(csv.DictReader(io.StringIO(text)))


def shown(study):
  """Return {heading: text} for each row."""
  columns, rows = tables.columns(study), tables.rows(study)
  return [{c.heading: c.text(row) for c in columns} for row in rows]


@pytest.fixture
def three(tmp_path):
  """Write three finished runs of one recipe, and an unfinished one."""
  values = [
    (0.60, 0.50, 1.0, 600, 100.0),
    (0.64, 0.56, 1.3, 660, 0.0),  # Too short to measure speed.
    (0.65, 0.50, 1.6, 720, 400.0),
  ]
  for seed, (best, last, loss, seconds, speed) in enumerate(values):
    result = {"best_accuracy": best, "last_accuracy": last}
    result |= {"last_loss": loss, "seconds": seconds}
    result |= {"images_per_second": speed}
    fake_runs.write(tmp_path / f"{seed}", PUBLISHED | {"seed": seed}, result)
  fake_runs.write(tmp_path / "open", PUBLISHED | {"seed": 3}, None)
  return run_groups.collect(tmp_path)


def test_means_and_standard_deviations(three):
  (row,) = tables.rows(three)
  assert row["runs"] == 3
  assert row["best_accuracy_mean"] == pytest.approx(0.63)
  # Divided by n - 1: sqrt((0.03² + 0.01² + 0.02²) / 2).
  assert row["best_accuracy_sd"] == pytest.approx(0.0264575131)
  assert row["last_accuracy_mean"] == pytest.approx(0.52)
  assert row["last_accuracy_sd"] == pytest.approx(0.0346410162)
  assert row["last_loss_mean"] == pytest.approx(1.3)
  assert row["minutes_mean"] == pytest.approx(11)
  assert row["images_per_second_mean"] == pytest.approx(250)
  assert row["parameters"] == 85_800_000


def test_confidence_intervals_over_test_images(three, tmp_path):
  expected = stats.binomtest(5200, 10_000).proportion_ci(method="wilson")
  (row,) = tables.rows(three)
  ends = row["last_accuracy_low"], row["last_accuracy_high"]
  assert ends == pytest.approx((expected.low, expected.high))
  finished, *_, unfinished = tables.run_rows(three)
  last = finished["last_accuracy"]
  assert finished["last_accuracy_low"] < last < finished["last_accuracy_high"]
  assert unfinished["last_accuracy_low"] is None
  del three.groups[0][0].result["examples_evaluated"]
  (row,) = tables.rows(three)
  assert row["last_accuracy_low"] is None


def test_difference_from_the_published_run(three):
  (row,) = tables.rows(three)
  assert row["published_best_accuracy"] == 0.6756
  assert row["published_last_accuracy"] == 0.6747
  assert row["published_minutes"] == 68.5
  assert row["best_accuracy_difference"] == pytest.approx(0.63 - 0.6756)
  assert row["last_accuracy_difference"] == pytest.approx(0.52 - 0.6747)


def test_all_published_runs_of_rescalevit_are_matched(tmp_path):
  figures = reference_results.figures()
  for i, (dataset, model, norm, pretrained) in enumerate(figures):
    config = {"dataset": dataset, "model_name": model, "model.norm": norm}
    config["pretrained_path"] = f"{model}.npz" if pretrained else None
    config["batch"] = 64 if model == "ViT-L_16" else 128
    fake_runs.write(tmp_path / f"{i}", config, {}, steps=0)
  rows = shown(run_groups.collect(tmp_path))
  assert len(rows) == 40
  found = {
    (*(row[key] for key in ("dataset", "model", "norm", "pretrained")),): (
      row["published best, %"],
      row["published last, %"],
    )
    for row in rows
  }
  for (dataset, model, norm, pretrained), x in figures.items():
    assert found[dataset, model, norm, "yes" if pretrained else "no"] == tuple(
      tables.NOTHING if y is None else f"{100 * y:.1f}"
      for y in (x.best_accuracy, x.last_accuracy)
    )


def test_googles_recipe_has_only_a_published_last_accuracy(tmp_path):
  path = paths.ROOT / "configs" / "vit_b16_finetune_google.py"
  config = runpy.run_path(str(path))["get_config"]()
  fake_runs.write(tmp_path / "a", config_lib.flatten(config), {})
  study = run_groups.collect(tmp_path)
  (row,) = shown(study)
  assert row["published best, %"] == row["difference, best"] == tables.NOTHING
  assert row["published last, %"] == "98.6"
  assert row["difference, last"] == "−58.6"
  text = " ".join(notes.describe(study))
  assert "Google's README" in text and "RescaleViT" not in text


def test_a_validation_split_has_a_column(tmp_path):
  num_val = PUBLISHED | {"data.num_val": 5000}
  fake_runs.write(tmp_path / "one", num_val, {})
  (row,) = shown(run_groups.collect(tmp_path))
  assert row["data.num_val"] == "5000"
  assert "published best, %" not in row


def test_table_text(three):
  assert shown(three) == [
    {
      "dataset": "cifar10",
      "model": "ViT-B_32",
      "norm": "LN",
      "pretrained": "no",
      "resolution": "224",
      "runs (n)": "3",
      "best accuracy, %": "63.0 ± 2.6",
      "last accuracy, %": "52.0 ± 3.5",
      "95 % interval": "51.0 to 53.0",
      "last test loss": "1.300",
      "minutes": "11.0",
      "images/s": "250.0",
      "parameters, M": "85.8",
      "published best, %": "67.6",
      "published last, %": "67.5",
      "difference, best": "−4.6",
      "difference, last": "−15.5",
    }
  ]


def test_a_single_run_has_no_deviation(tmp_path):
  speed = {"images_per_second": 0.0}
  fake_runs.write(tmp_path / "a", {"total_steps": 1000}, speed)
  study = run_groups.collect(tmp_path)
  (row,) = tables.rows(study)
  assert row["best_accuracy_mean"] == 0.5
  assert row["best_accuracy_sd"] is None
  assert row["images_per_second_mean"] is None
  (line,) = shown(study)
  assert line["best accuracy, %"] == "50.0"
  assert line["images/s"] == tables.NOTHING
  (line,) = read(tables.to_csv([row]))
  assert line["best_accuracy_sd"] == line["images_per_second_mean"] == ""


def test_equal_runs_have_a_deviation_of_zero(tmp_path):
  for seed in (0, 1):
    fake_runs.write(tmp_path / f"{seed}", {"seed": seed}, {})
  (line,) = shown(run_groups.collect(tmp_path))
  assert line["best accuracy, %"] == "50.0 ± 0.00"


def test_published_columns_only_beside_a_published_recipe(tmp_path):
  fake_runs.write(tmp_path / "a", PUBLISHED | {"base_lr": 0.1}, {})
  study = run_groups.collect(tmp_path)
  assert not any("published" in c.heading for c in tables.columns(study))
  (row,) = tables.rows(study)
  assert row["published_best_accuracy"] is None
  assert row["best_accuracy_difference"] is None
  fake_runs.write(tmp_path / "b", PUBLISHED, {"best_accuracy": 0.6758})
  other, same = shown(run_groups.collect(tmp_path))[::-1]
  assert other["published best, %"] == tables.NOTHING
  assert other["difference, best"] == tables.NOTHING
  assert same["difference, best"] == "0.0"


def test_a_key_that_differs_between_groups_has_a_column(tmp_path):
  for i, (rate, size) in enumerate([(0.05, None), (0.5, 96)]):
    config = {"base_lr": rate, "model.hidden_size": size}
    fake_runs.write(tmp_path / f"{i}", config, {})
  study = run_groups.collect(tmp_path)
  lines = shown(study)
  assert [line["base_lr"] for line in lines] == ["0.05", "0.5"]
  assert [line["model.hidden_size"] for line in lines] == [tables.NOTHING, "96"]
  assert "batch" not in lines[0]
  numeric = {c.heading: c.numeric for c in tables.columns(study)}
  assert numeric["base_lr"] and not numeric["norm"]
  written = read(tables.to_csv(tables.rows(study)))
  assert [line["base_lr"] for line in written] == ["0.05", "0.5"]
  assert [line["model.hidden_size"] for line in written] == ["", "96"]


def test_csv_has_full_precision(tmp_path):
  best = 0.12345678901234567
  fake_runs.write(tmp_path / "a", {}, {"best_accuracy": best})
  study = run_groups.collect(tmp_path)
  (row,) = read(tables.to_csv(tables.rows(study)))
  assert float(row["best_accuracy_mean"]) == best
  (row,) = read(tables.to_csv(tables.run_rows(study)))
  assert float(row["best_accuracy"]) == best


def test_table_of_individual_runs(three):
  rows = read(tables.to_csv(tables.run_rows(three)))
  assert [row["run"] for row in rows] == ["0", "1", "2", "open"]
  first, unfinished = rows[0], rows[-1]
  assert first["state"] == "finished" and unfinished["state"] == "unfinished"
  assert first["seed"] == "0" and unfinished["seed"] == "3"
  assert first["best_accuracy"] == "0.6" and first["minutes"] == "10.0"
  assert first["devices"] == "2 x H100"
  assert first["versions"] == "python 3.11, jax 0.10"
  assert first["step"] == "20000" and unfinished["step"] == "300"
  assert unfinished["total_steps"] == "20000"
  assert unfinished["best_accuracy"] == unfinished["minutes"] == ""


def test_unfinished_and_damaged_runs_are_omitted(three, tmp_path):
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "config.json").write_text("?")
  sections = dict(tables.left_out(run_groups.collect(tmp_path)))
  assert sections["Unfinished"] == ["open: step 300 of 20000"]
  assert sections["Damaged"][0].startswith("bad/config.json: ")
  assert list(dict(tables.left_out(three))) == ["Unfinished"]


def test_the_error_of_a_failed_run_is_listed(three, tmp_path):
  (tmp_path / "open" / "log.txt").write_text("step 300\nerror: loss nan\n")
  sections = dict(tables.left_out(run_groups.collect(tmp_path)))
  assert sections["Unfinished"] == ["open: step 300 of 20000; error: loss nan"]


def test_the_error_of_a_diverged_run_is_listed(three, tmp_path):
  error = "step 301: training diverged"
  result_lib.write(tmp_path / "open", result_lib.diverged(301, error))
  study = run_groups.collect(tmp_path)
  sections = dict(tables.left_out(study))
  assert sections["Diverged"] == [f"open: step 301 of 20000; error: {error}"]
  assert [row["step"] for row in tables.run_rows(study)][-1] == 301
  states = [row["state"] for row in tables.run_rows(study)]
  assert states == ["finished"] * 3 + ["diverged"]


def test_markdown_table_by_hand(three):
  columns, rows = tables.columns(three), tables.rows(three)
  head, line, row = markdown.table(*tables.cells(columns, rows)).splitlines()
  assert head.startswith("| dataset | model |")
  assert line.startswith("| --- | --- | --- | --- | --: |")
  assert row.startswith("| cifar10 | ViT-B_32 | LN | no | 224 | 3 | 63.0 ± 2.6")
  assert len({text.count("|") for text in (head, line, row)}) == 1


def test_markdown_syntax_in_names_is_escaped():
  text = markdown.escape("a|b <i> & `c`\nd")
  assert text == "a\\|b &lt;i&gt; &amp; \\`c\\` d"
