"""Evaluation counts every example once."""

import csv
import json
import shutil

import jax
import numpy as np
import optax
from PIL import Image
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import dataset
from rescalevit_jax.data import loader
from rescalevit_jax.data import resident
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runs import folder
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import evaluate_run
from rescalevit_jax.training import scores
from rescalevit_jax.training import train


@pytest.fixture(scope="module")
def setting():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (23, 8, 8, 3)).astype(np.uint8)
  labels = rng.integers(0, 4, 23).astype(np.int32)
  model = models.create(
    "ViT-XS_2",
    num_classes=4,
    norm="BN",
    image_size=8,
    patch_size=4,
    hidden_size=8,
    mlp_dim=16,
    num_heads=2,
    num_layers=1,
  )
  x = preprocess.prepare(images, 8)
  variables = model.init(jax.random.key(0), x, train=False)
  return model, variables, images, labels, model.apply(variables, x)


def create_evaluator(model, images, labels, batch=5):
  mesh = sharding.create_mesh()
  return evaluate.Evaluator(
    model,
    loader.Loader(resident.Split(images, labels), mesh),
    image_size=8,
    batch=batch,
    mesh=mesh,
  )


@pytest.mark.parametrize("batch", [1, 5, 8, 22, 23, 24, 1000])
def test_any_batch_counts_every_example_once(setting, batch):
  model, variables, images, labels, logits = setting
  result = create_evaluator(model, images, labels, batch)(**variables)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert result.examples == 23
  assert result.accuracy == (logits.argmax(-1) == labels).sum() / 23
  np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-6)


def test_evaluation_stops_on_request(setting):
  model, variables, images, labels, _ = setting
  evaluator = create_evaluator(model, images, labels)
  asked = iter([False, False, True])
  assert evaluator(**variables, stopped=lambda: next(asked)) is None


def write_set(root, names, counts=(6, 4)):
  """Write a folder dataset of gray squares, one brightness per class."""
  for split, count in zip(("train", "test"), counts, strict=True):
    for i, name in enumerate(names):
      (root / split / name).mkdir(parents=True)
      for j in range(count):
        pixels = np.full((8, 8, 3), 60 * i + j, np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{j}.png")
  return f"folder:{root}"


@pytest.fixture(scope="module")
def trained(module_config, tmp_path_factory):
  root = tmp_path_factory.mktemp("sets")
  config = module_config.copy_and_resolve_references()
  config.dataset = write_set(root / "own", ("a", "b", "c"))
  config.batch, config.total_steps, config.warmup_steps = 6, 4, 1
  config.save_predictions = True
  result = train.train_and_evaluate(config, root / "run")
  return config, root / "run", result


@pytest.fixture
def finished(trained):
  """Return config, folder and result of a run on a folder dataset."""
  config, workdir, result = trained
  return config.copy_and_resolve_references(), workdir, result


def test_a_finished_run_has_all_scores(finished):
  _, workdir, result = finished
  written = json.loads((workdir / "eval.json").read_text())
  assert written["weights"] == "last step" and written["split"] == "test"
  assert written["accuracy"] == result["last_accuracy"]
  np.testing.assert_allclose(written["loss"], result["last_loss"], rtol=1e-5)
  low, high = result["accuracy_interval"]
  assert low <= result["last_accuracy"] <= high and low < high
  assert 0 <= result["train_accuracy"] <= 1
  assert result["examples_evaluated"] == written["examples"] == 12
  with open(workdir / "confusion.csv", newline="") as f:
    header, *rows = csv.reader(f)
  assert header == ["label", "a", "b", "c"]
  assert [sum(map(int, row[1:])) for row in rows] == [4, 4, 4]
  with np.load(workdir / "predictions.npz") as saved:
    assert saved["logits"].shape == (12, 3)
    assert saved["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    correct = saved["logits"].argmax(-1) == saved["labels"]
  assert correct.mean() == result["last_accuracy"]


def test_eval_dataset_with_the_runs_classes(finished, tmp_path):
  config, workdir, _ = finished
  config.eval_dataset = write_set(tmp_path / "other", ("a", "b", "c"), (1, 7))
  found = evaluate_run.evaluate_run(config, workdir)
  assert found["examples"] == 21 and found["dataset"] == config.eval_dataset
  config.eval_dataset = write_set(tmp_path / "wrong", ("a", "b", "x"))
  with pytest.raises(errors.UserError, match="has the classes a, b, x"):
    evaluate_run.evaluate_run(config, workdir)


def test_eval_split_of_the_runs_dataset(finished):
  config, workdir, _ = finished
  own = (workdir / "eval.json").read_bytes()
  config.eval_split = "train[:50%]+test"
  found = evaluate_run.evaluate_run(config, workdir)
  assert found["examples"] == 9 + 12 and found["split"] == config.eval_split
  assert found["dataset"] == config.dataset
  output = folder.evaluation(workdir, config)
  assert output.parent == workdir / "evaluations"
  assert json.loads((output / "eval.json").read_text()) == found
  with np.load(output / "predictions.npz") as saved:
    assert len(saved["labels"]) == 21
  assert (workdir / "eval.json").read_bytes() == own
  probe = evaluate_run.probe_run(config, workdir)
  assert probe["examples"] == 21 and probe["split"] == config.eval_split
  assert (output / "probe.json").exists()
  config.eval_split = "none"
  with pytest.raises(errors.UserError, match=r"eval_split \(none\) is not"):
    evaluate_run.evaluate_run(config, workdir)
  config.eval_split, config.data.test_split = None, "train"
  with pytest.raises(errors.UserError, match="config.eval_split"):
    evaluate_run.evaluate_run(config, workdir)


def test_results_of_different_images_are_in_different_folders(tmp_path):
  config, found = config_lib.default(), set()
  alike = "other/a", "other_a", "other/*", "other_all", "other-test[:50%]"
  for config.eval_dataset in (None, "other", *alike):
    for config.eval_split in (None, "test[:50%]", "test[50%:]", "test[50:]"):
      found.add(folder.evaluation(tmp_path, config))
  assert len(found) == 28 and tmp_path in found
  assert {x.parent for x in found - {tmp_path}} == {tmp_path / "evaluations"}
  config.eval_dataset = "folder:" + 90 * "a-"
  with pytest.raises(errors.UserError, match="eval_dataset .* is too long"):
    folder.evaluation(tmp_path, config)
  config.eval_dataset, config.eval_split = None, "+".join(60 * ["test"])
  with pytest.raises(errors.UserError, match="eval_split .* is too long"):
    folder.evaluation(tmp_path, config)
  config.dataset, config.eval_split = "folder:" + 90 * "a-", "test"
  with pytest.raises(errors.UserError, match="config: dataset .* is too long"):
    folder.evaluation(tmp_path, config)


def test_all_corruptions_of_a_dataset_are_evaluated(finished, monkeypatch):
  """Names determine corruptions and severities."""
  config, workdir, _ = finished
  config.eval_dataset = "corrupted/*"
  own = dataset.load(config.dataset, None)
  names = ["blur_1", "blur_2", "blur_3", "fog_1"]
  monkeypatch.setattr(
    evaluate_run.dataset_lib,
    "expand",
    lambda name, data_dir: [f"corrupted/{x}" for x in names],
  )

  def load_test(name, data_dir, **kwargs):
    count = 12 if name.endswith("fog_1") else 6
    part = own.test.subset(np.arange(count))
    return part, "test", own.class_names, 0

  monkeypatch.setattr(evaluate_run.dataset_lib, "load_test", load_test)
  compiled, step = [], evaluate.compiled_step
  monkeypatch.setattr(
    evaluate, "compiled_step", lambda *x: compiled.append(x) or step(*x)
  )
  with pytest.raises(errors.UserError, match="supports one dataset"):
    evaluate_run.evaluate_run(config, workdir)
  config.save_predictions = False
  found = evaluate_run.evaluate_run(config, workdir)
  assert len(compiled) == 1
  assert list(found["datasets"]) == [f"corrupted/{x}" for x in names]
  accuracy = {k: x["accuracy"] for k, x in found["datasets"].items()}
  blur = 1 - accuracy["corrupted/blur_1"]
  fog = 1 - accuracy["corrupted/fog_1"]
  assert found["mean_corruption_error"] == pytest.approx((blur + fog) / 2)
  assert found["mean_accuracy"] == pytest.approx(np.mean([*accuracy.values()]))
  with pytest.raises(errors.UserError, match="is 4 datasets"):
    evaluate_run.probe_run(config, workdir)


def test_a_dataset_without_class_names_is_evaluated(
  finished, monkeypatch, caplog
):
  """cifar10_1 and cifar10_corrupted of tfds have no class names."""
  config, workdir, _ = finished
  config.eval_dataset = f"{config.dataset}_1"
  own = dataset.load(config.dataset, None)
  names, keys = ("0", "1", "2"), {}
  monkeypatch.setattr(
    evaluate_run.dataset_lib,
    "load_test",
    lambda *args, **kwargs: keys.update(kwargs) or (own.test, "a", names, 3),
  )
  with pytest.raises(errors.UserError, match="has the classes 0, 1"):
    evaluate_run.evaluate_run(config, workdir)  # Folders have names.
  monkeypatch.setattr(evaluate_run.folder_data, "PREFIX", "none:")
  monkeypatch.setattr(
    evaluate_run.experiment_lib, "load_dataset", lambda config: own
  )
  found = evaluate_run.evaluate_run(config, workdir)
  assert found["skipped_images"] == 3 and set(found["per_class"]) == {*"abc"}
  assert "_1 does not name its classes" in caplog.text
  assert "image_size" in keys and keys["test_split"] is None
  config.eval_dataset = "digits"
  with pytest.raises(errors.UserError, match="has the classes 0, 1"):
    evaluate_run.evaluate_run(config, workdir)


def test_nonfinite_weights_are_an_error(setting):
  *_, labels, logits = setting
  broken = np.asarray(logits).copy()
  broken[3, 1] = np.nan
  with pytest.raises(errors.UserError, match="best checkpoint.*1 images"):
    scores.evaluation(broken, labels, "abcd", weights="best checkpoint")


def test_nonfinite_features_are_an_error(finished, monkeypatch):
  config, workdir, _ = finished
  features = evaluate.Evaluator.features

  def broken(*args):
    found, labels = features(*args)
    return np.where(found == found.max(), np.inf, found), labels

  monkeypatch.setattr(evaluate.Evaluator, "features", broken)
  with pytest.raises(errors.UserError, match="features are not finite"):
    evaluate_run.probe_run(config, workdir)


def test_evaluation_ignores_the_training_batch_size(finished, monkeypatch):
  """Evaluation does not require that devices divide the training batch."""
  config, workdir, _ = finished

  def refuse(*args):
    raise errors.UserError("config: batch does not fit")

  monkeypatch.setattr(sharding, "check_batch", refuse)
  assert evaluate_run.evaluate_run(config, workdir)["examples"] == 12


def test_frozen_features_are_the_heads_inputs(setting):
  model, variables, images, labels, logits = setting
  evaluator = create_evaluator(model, images, labels)
  features, found = evaluator.features(**variables)
  np.testing.assert_array_equal(found, labels)
  head = variables["params"]["head"]
  expected = features @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(expected, logits, rtol=1e-5, atol=1e-5)


def test_linear_probe_and_knn_of_a_run(finished):
  config, workdir, _ = finished
  found = evaluate_run.probe_run(config, workdir)
  assert found == json.loads((workdir / "probe.json").read_text())
  assert found["examples"] == 12
  for kind in ("knn", "linear"):
    low, high = found[kind]["accuracy_interval"]
    assert 0 <= low <= found[kind]["accuracy"] <= high <= 1


def test_training_accuracy_covers_all_classes(finished, monkeypatch, tmp_path):
  """A folder dataset is sorted by class."""
  config, _, _ = finished
  config.dataset = write_set(tmp_path / "set", ("a", "b", "c"), (12, 4))
  splits = []

  class Loader(loader.Loader):
    def __init__(self, split, mesh):
      super().__init__(split, mesh)
      splits.append(split)

  monkeypatch.setattr(loader, "Loader", Loader)
  train.train_and_evaluate(config, tmp_path / "run")
  assert len(splits[-1]) == 12
  assert set(splits[-1].labels.tolist()) == {0, 1, 2}


def test_a_run_does_not_resume_with_other_data(finished, tmp_path):
  config, workdir, _ = finished
  config.dataset = write_set(tmp_path / "set", ("a", "b", "c"), (7, 4))
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "result.json").unlink()
  text = config_lib.to_json(config)
  (tmp_path / "run" / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match="18 training images.* 21 now"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_classes_that_the_run_does_not_have_are_an_error(finished, tmp_path):
  config, workdir, _ = finished
  config.dataset = write_set(tmp_path / "set", ("a", "b", "c"))
  shutil.copytree(workdir, tmp_path / "run")
  for name in ("config.json", "result.json"):
    (tmp_path / "run" / name).unlink()
  text = config_lib.to_json(config)
  (tmp_path / "run" / "config.json").write_text(text)
  for split in ("train", "test"):
    (tmp_path / "set" / split / "a").rename(tmp_path / "set" / split / "z")
  for start in (train.train_and_evaluate, evaluate_run.evaluate_run):
    with pytest.raises(errors.UserError, match="classes.*differ in a, z"):
      start(config, tmp_path / "run")
