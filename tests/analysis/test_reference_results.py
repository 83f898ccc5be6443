"""Published figures, their configs and their curves."""

import csv

import paths
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.analysis import reference_results

HEADER = "dataset,model,norm,pretrained,step,valid_loss,valid_accuracy\n"


def config(**changes):
  result = config_lib.default()
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  result.update_from_flattened_dict(changes)
  return result


def test_figures():
  figures = reference_results.FIGURES
  assert len(figures) == 27
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
    assert 0 < run.last_accuracy <= run.best_accuracy < 1


def test_figures_match_the_logs():
  path = paths.SHARED / "seed_results"
  if not path.exists():
    pytest.skip(f"needs {path / 'runs.csv'}")
  with open(path / "runs.csv", newline="") as f:
    whole = [r for r in csv.DictReader(f) if r["evaluations"] == "200"]
  assert {
    (r["dataset"], r["model"], r["norm"], r["pretrained"] == "True"): (
      reference_results.Figures(
        float(r["best_accuracy_seen"]),
        float(r["last_accuracy"]),
        float(r["minutes_rtx3090"]),
      )
    )
    for r in whole
  } == reference_results.FIGURES


@pytest.mark.parametrize("key", ["BN", "GN", "Rescale"])
def test_incomplete_runs_have_no_figures(key):
  assert ("cifar100", "ViT-L_16", key, False) not in reference_results.FIGURES


def test_other_weights_do_not_match():
  assert reference_results.match(config(pretrained_path="ViT-B_32.npz")) is None
  assert (
    reference_results.match(config(pretrained_path="my_cifar100.npz")) is None
  )


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
def test_keys_without_effect_do_not_matter(changes):
  assert reference_results.match(config(**changes)) == (
    "cifar10",
    "ViT-B_16",
    "LN",
    False,
  )


def test_pretrained_and_scratch_are_distinguished():
  keys = {
    reference_results.match(config(pretrained_path=path))
    for path in (None, "ViT-B_16.npz", "/in21k/ViT-B_16.npz")
  }
  assert keys == {
    ("cifar10", "ViT-B_16", "LN", False),
    ("cifar10", "ViT-B_16", "LN", True),
  }


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
    {"eval_every": 50},  # More evaluations, a higher best.
  ],
)
def test_other_recipes_do_not_match(changes):
  assert reference_results.match(config(**changes)) is None


def test_read_curves(tmp_path):
  path = tmp_path / "curves.csv"
  path.write_text(
    "note,"
    + HEADER
    + "x,cifar10,ViT-B_32,LN,1,200,0.5,0.9\n"
    + "x,cifar10,ViT-B_32,LN,0,100,2.5,0.25\n"
    + "x,cifar10,ViT-B_32,LN,1,100,1.5,0.75\n"
  )
  assert reference_results.read_curves(path) == {
    ("cifar10", "ViT-B_32", "LN", True): reference_results.Curve(
      (100, 200), (1.5, 0.5), (0.75, 0.9)
    ),
    ("cifar10", "ViT-B_32", "LN", False): reference_results.Curve(
      (100,), (2.5,), (0.25,)
    ),
  }


@pytest.mark.parametrize(
  "text, words",
  [
    ("dataset,model,norm,step\n", ["line 1", "pretrained", "valid_loss"]),
    ("", ["line 1"]),
    ("a,b,LN,0,100,2,0.1\na,b,LN,0,x,2,0.1\n", ["line 3", "step", "'x'"]),
    ("a,b,LN,0,100,nan,0.1\n", ["line 2", "valid_loss", "'nan'"]),
    ("a,b,LN,0,100,2,57.1\n", ["line 2", "valid_accuracy", "'57.1'"]),
    ("a,b,LN,yes,100,2,0.1\n", ["line 2", "pretrained", "'yes'"]),
    ("a,b,LN,0,100\n", ["line 2", "valid_loss", "''"]),
    ("a,b,LN,0,1,2,0.1\na,b,LN,0,1,2,0.1\n", ["line 3", "repeats step 1", "1"]),
  ],
)
def test_invalid_curves_are_errors(text, words, tmp_path):
  path = tmp_path / "curves.csv"
  path.write_text(text if text[:7] in ("", "dataset") else HEADER + text)
  with pytest.raises(errors.UserError) as e:
    reference_results.read_curves(path)
  for word in [str(path), *words]:
    assert word in str(e.value)


@pytest.mark.parametrize("data", [None, b"\xff\xfe\x00PNG"])
def test_an_unreadable_file_of_curves_is_an_error(data, tmp_path):
  path = tmp_path / "curves.csv"
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(errors.UserError, match=r"curves\.csv"):
    reference_results.read_curves(path)
