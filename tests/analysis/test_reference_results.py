"""Published results, their configs and their curves."""

import runpy

import paths
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax.analysis import reference_results

# The key of the default config.
DEFAULT = ("cifar10", "ViT-B_16", "LN", False)


def config(**changes):
  result = config_lib.default()
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  result.update_from_flattened_dict(changes)
  return result


def test_published_figures_match_their_configs():
  figures = reference_results.figures()
  assert len(figures) == 40
  assert figures["cifar100", "ViT-B_16", "Rescale", False] == (
    reference_results.Figures(0.3609, 0.3554, 162.6)
  )
  assert figures["cifar10", "ViT-L_16", "LN", True] == (
    reference_results.Figures(0.9899, 0.9899, 308.2)
  )
  for key, run in figures.items():
    dataset, model, norm, pretrained = key
    changes = {"dataset": dataset, "model_name": model, "model__norm": norm}
    changes["pretrained_path"] = f"in21k/{model}.npz" if pretrained else None
    changes["batch"] = 64 if model == "ViT-L_16" else 128
    assert reference_results.match(config(**changes)) == key
    assert 0 < (run.last_accuracy or 0.01) <= run.best_accuracy < 1
  assert sum(run.last_accuracy is not None for run in figures.values()) == 27


@pytest.mark.parametrize("name", ["table.csv", "curves.csv"])
def test_packaged_files_equal_the_published_files(name):
  path = paths.SHARED / "seed_results" / name
  if not path.exists():
    pytest.skip(f"needs {path}")
  packaged = reference_results._FOLDER / name
  assert packaged.read_bytes() == path.read_bytes()


def test_best_accuracies_agree_with_the_published_table():
  """The logs have more digits than the table."""
  for row in reference_results._rows("table.csv"):
    figures = reference_results.figures()[reference_results._key(row)]
    table = float(row["best_accuracy_percent"])
    assert abs(100 * figures.best_accuracy - table) < 0.11


def test_every_complete_run_has_a_curve():
  curves = reference_results.curves()
  figures = reference_results.figures()
  assert curves.keys() == {
    key for key, x in figures.items() if x.last_accuracy is not None
  }
  for key, curve in curves.items():
    assert curve.steps == tuple(range(100, 20_001, 100))
    assert curve.accuracy[-1] == figures[key].last_accuracy
    assert max(curve.accuracy) == figures[key].best_accuracy


@pytest.mark.parametrize(
  "changes",
  [
    {"seed": 7},
    {"dtype": "float32"},
    {"deterministic": True},
    {"reinit_head": True},
    {"tfds_data_dir": "/data", "batch_eval": 1000, "checkpoint_every": 7},
  ],
)
def test_keys_without_effect_are_ignored(changes):
  assert reference_results.match(config(**changes)) == DEFAULT


def test_pretrained_and_scratch_are_distinguished():
  keys = [
    reference_results.match(config(pretrained_path=path))
    for path in (None, "ViT-B_16.npz", "/in21k/ViT-B_16.npz")
  ]
  pretrained = (*DEFAULT[:3], True)
  assert keys == [DEFAULT, pretrained, pretrained]


@pytest.mark.parametrize(
  "changes",
  [
    {"base_lr": 0.03},
    {"total_steps": 10_000},
    {"image_size": 384},
    {"batch": 64},
    {"batch": 128, "model_name": "ViT-L_16"},
    {"model_name": "ViT-S_16"},
    {"dataset": "digits"},
    {"model__gelu": "tanh"},
    {"model__hidden_size": 96},
    {"augment__flip": True},
    {"eval_every": 50},  # More evaluations increase the best accuracy.
    {"pretrained_path": "ViT-B_32.npz"},
    {"pretrained_path": "my_cifar100.npz"},
  ],
)
def test_other_recipes_do_not_match(changes):
  assert reference_results.match(config(**changes)) is None


def google_config(*args):
  path = paths.ROOT / "configs" / "vit_b16_finetune_google.py"
  return runpy.run_path(str(path))["get_config"](*args)


@pytest.mark.parametrize(
  "args, accuracy, minutes",
  [
    ((), 0.9859, 17),
    (("cifar100,1000",), 0.9115, 39),
    (("cifar100,10000",), 0.9206, 132),
  ],
)
def test_googles_recipes_have_published_accuracy(args, accuracy, minutes):
  found = reference_results.find(google_config(*args))
  expected = reference_results.Figures(None, accuracy, minutes, "Google")
  assert found == expected


@pytest.mark.parametrize(
  "key, value, accuracy",
  [
    ("accum_steps", 2, 0.9902),
    ("seed", 3, 0.9902),
    ("model.dropout_rate", 0.1, 0.9876),
    ("model.dropout_rate", 0.2, None),
    ("total_steps", 9_000, None),
    ("base_lr", 0.03, None),
    ("model.norm", "BN", None),
    ("pretrained_path", None, None),
    ("pretrained_path", "mine.npz", None),
    ("data.train_split", "train", None),
    ("dataset", "digits", None),
  ],
)
def test_other_fine_tuning_has_no_published_accuracy(key, value, accuracy):
  changed = google_config("cifar10,10000")
  changed.update_from_flattened_dict({key: value})
  found = reference_results.find(changed)
  assert (found and found.last_accuracy) == accuracy


def test_other_dropout_than_googles_does_not_match():
  changed = google_config()
  changed.model.dropout_rate = 0.5
  assert reference_results.find(changed) is None


def test_all_rows_of_googles_table_are_read():
  results = reference_results.google()
  assert len(results) == 20
  assert results["cifar10", "ViT-L_16", 10_000, 500, "0.1"].minutes == 1482


def test_rescalevits_recipe_has_rescalevits_published_accuracy():
  expected = reference_results.figures()[DEFAULT]
  assert reference_results.find(config()) == expected
