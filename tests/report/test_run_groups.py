"""Grouping, selecting and sorting the runs of a folder."""

import fake_runs
import pytest

from rescalevit_jax import errors
from rescalevit_jax.report import run_groups


def names(study):
  return [[study.name(run) for run in group] for group in study.groups]


def test_seeds_and_keys_without_effect_share_a_group(tmp_path):
  fake_runs.write(tmp_path / "a", {"seed": 10}, {})
  fake_runs.write(tmp_path / "b", {"seed": 9, "tfds_data_dir": "/x"}, {})
  fake_runs.write(tmp_path / "c" / "d", {"seed": 0, "batch_eval": 7}, {})
  fake_runs.write(tmp_path / "e", {"dtype": "float32"}, {})
  fake_runs.write(tmp_path / "f", {"base_lr": 0.1}, {})
  study = run_groups.collect(tmp_path)
  assert sorted(names(study)) == [["c/d", "b", "a"], ["e"], ["f"]]
  assert study.varied == ("base_lr", "dtype")


def test_groups_are_sorted_by_recipe(tmp_path):
  expected = []
  for dataset in ("cifar10", "cifar100"):
    for model in ("ViT-B_16", "ViT-L_16"):
      for norm in ("LN", "BN", "GN", "Rescale"):
        for path in (None, "w.npz"):
          for size in (96, 224):
            expected.append((dataset, model, norm, path, size))
  keys = ("dataset", "model_name", "model.norm", "pretrained_path")
  # Paths have the opposite order.
  for i, values in enumerate(expected):
    config = dict(zip((*keys, "image_size"), values, strict=True))
    fake_runs.write(tmp_path / f"{999 - i}", config, {})
  study = run_groups.collect(tmp_path)
  assert names(study) == [[f"{999 - i}"] for i in range(len(expected))]
  assert study.varied == ()


def test_groups_with_and_without_a_value_can_be_sorted(tmp_path):
  for i, size in enumerate((96, None, 48)):
    fake_runs.write(tmp_path / f"{i}", {"model.hidden_size": size}, {})
  study = run_groups.collect(tmp_path)
  assert names(study) == [["1"], ["2"], ["0"]]
  assert study.varied == ("model.hidden_size",)


def test_pretrained_path_has_a_column_if_a_model_has_several(tmp_path):
  b, large = {"model_name": "ViT-B_16"}, {"model_name": "ViT-L_16"}
  fake_runs.write(tmp_path / "a", b, {})
  fake_runs.write(tmp_path / "b", b | {"pretrained_path": "b.npz"}, {})
  fake_runs.write(tmp_path / "c", large | {"pretrained_path": "l.npz"}, {})
  assert run_groups.collect(tmp_path).varied == ()
  fake_runs.write(tmp_path / "d", b | {"pretrained_path": "d.npz"}, {})
  assert run_groups.collect(tmp_path).varied == ("pretrained_path",)


def test_unfinished_and_damaged_runs_are_in_no_group(tmp_path):
  fake_runs.write(tmp_path / "ok", {}, {})
  fake_runs.write(tmp_path / "open", {"seed": 1, "base_lr": 1.0}, None)
  for name in ("config", "result"):
    run = fake_runs.write(tmp_path / f"{name} cut", {"seed": 2}, {})
    (run / f"{name}.json").write_text('{"seed": ')
  fake_runs.write(tmp_path / "no loss", {"seed": 3}, {"last_loss": None})
  fake_runs.write(tmp_path / "text", {"seed": 3}, {"best_accuracy": "0.5"})
  fake_runs.write(tmp_path / "foreign", {"seed": -1}, {})
  study = run_groups.collect(tmp_path)
  assert names(study) == [["ok"]]
  assert [study.name(run) for run in study.unfinished] == ["open"]
  assert study.varied == ()
  expected = {
    "config cut/config.json": "",
    "result cut/result.json": "",
    "no loss/result.json": "last_loss",
    "text/result.json": "best_accuracy",
    "foreign/config.json": "seed",
  }
  assert len(study.damaged) == len(expected)
  for path, key in expected.items():
    (line,) = [line for line in study.damaged if line.startswith(f"{path}: ")]
    assert key in line and "\n" not in line


def test_a_single_run_has_the_name_of_its_folder(tmp_path):
  run = fake_runs.write(tmp_path / "alone", {}, {})
  assert names(run_groups.collect(run)) == [["alone"]]


def test_a_folder_without_runs_is_an_error(tmp_path):
  with pytest.raises(errors.UserError):
    run_groups.collect(tmp_path)
  with pytest.raises(errors.UserError):
    run_groups.collect(tmp_path / "none")


@pytest.mark.parametrize(
  "key, value",
  [
    ("last_loss", float("nan")),
    ("last_loss", float("inf")),
    ("last_loss", True),
    ("last_loss", "1"),
    pytest.param("last_loss", 10**400, id="huge"),
    ("examples_evaluated", "1"),
    ("last_accuracy", 3),
    ("devices", None),
    ("versions", None),
  ],
)
def test_a_result_with_an_invalid_value_is_damaged(tmp_path, key, value):
  fake_runs.write(tmp_path / "a", {}, {key: value})
  fake_runs.write(tmp_path / "b", {"seed": 1}, {})
  study = run_groups.collect(tmp_path)
  assert [run.workdir.name for run in study.finished] == ["b"]
  assert key in study.damaged[0]
