"""The training loop: files, timing, and equal results after a resume."""

import dataclasses
import json
import math
import shutil

import interruption
import jax
import numpy as np
import program_cache
import pytest
import recipes
from tensorboard.backend.event_processing import event_accumulator

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.data import dataset
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import metric_writers
from rescalevit_jax.runs import result as result_lib
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import evaluate_run
from rescalevit_jax.training import experiment
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import preemption
from rescalevit_jax.training import progress
from rescalevit_jax.training import train
from rescalevit_jax.training import train_step
from rescalevit_jax.training import trainer


def lines(workdir):
  with open(workdir / "metrics.jsonl", encoding="utf-8") as f:
    return [json.loads(line) for line in f]


def weights(workdir, which="latest"):
  params, batch_stats, _ = checkpoint.load_variables(workdir, which)
  return jax.tree.leaves((params, batch_stats))


def assert_same_run(a, b):
  lines_a, lines_b = a / "metrics.jsonl", b / "metrics.jsonl"
  assert lines_a.read_bytes() == lines_b.read_bytes()
  for which in ("latest", "best"):
    for x, y in zip(weights(a, which), weights(b, which), strict=True):
      np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module", autouse=True)
def programs():
  with program_cache.shared():
    yield


def test_run_writes_the_documented_files(default_run):
  result = json.loads((default_run / "result.json").read_text())
  found = lines(default_run)
  trained = [x["step"] for x in found if "train/loss" in x]
  tested = [x["step"] for x in found if "test/loss" in x]
  assert trained == [2, 4, 6, 8, 10, 12]
  assert tested == [5, 10, 12]  # The last step is also written.
  rates = {x["step"]: x["train/lr"] for x in found if "train/lr" in x}
  assert rates[2] == pytest.approx(0.05 * 2 / 3)
  assert rates[4] == pytest.approx(0.05 * (1 + math.cos(math.pi / 9)) / 2)
  assert rates[12] == 0
  accuracies = {
    x["step"]: x["test/accuracy"] for x in found if "test/accuracy" in x
  }
  assert result["best_accuracy"] == max(accuracies.values())
  assert accuracies[result["best_step"]] == result["best_accuracy"]
  assert result["last_step"] == 12
  assert result["last_accuracy"] == accuracies[12]
  assert result["examples_evaluated"] == 360
  assert result["images_per_second"] > 0 and result["seconds"] > 0
  assert result["parameters"] == sum(
    x.size
    for x in jax.tree.leaves(
      checkpoint.load_variables(default_run, "latest")[0]
    )
  )
  assert result["versions"]["jax"] == jax.__version__
  assert result["devices"]
  assert list(default_run.glob("events.out.tfevents*"))
  saved = json.loads((default_run / "config.json").read_text())
  assert saved["model"]["norm"] == "Rescale"
  best = checkpoint.load_variables(default_run, "best")
  assert best[2] == result["best_step"]


def test_step_time_excludes_startup_evaluation_and_diagnostics(
  tiny_config, tmp_path, monkeypatch
):
  calls, under_way = [], []

  def note(owner, name):
    real = getattr(owner, name)

    def noting(*args):
      calls.append((*under_way, name))
      under_way.append(name)
      real(*args)
      under_way.pop()

    monkeypatch.setattr(owner, name, noting)

  note(trainer.Trainer, "_step")
  note(progress.Timer, "first_step_done")
  note(progress.Timer, "restart")
  note(metric_writers.MetricWriter, "open")
  tiny_config.diagnostics_every = 3
  train.train_and_evaluate(tiny_config, tmp_path)
  of_steps = [call for call in calls if call[0] == "_step"]
  assert of_steps == [
    ("_step",),
    ("_step", "open"),  # Takes seconds, but ends before timing starts.
    ("_step", "first_step_done"),
    *[("_step",)] * 8,
    # Rescale is calibrated after 8 steps, then uses another program.
    ("_step", "first_step_done"),
    *[("_step",)] * 3,
  ]
  assert ("restart",) in calls  # After evaluations and checkpoints.


# Stops at steps before the first checkpoint (3), between two (7), and after the
# second last (11).
@pytest.mark.parametrize(
  "norm, options, stops",
  [
    ("LN", {}, (7,)),
    ("BN", {}, (3, 7)),
    pytest.param("GN", {}, (11,), marks=pytest.mark.slow),
    ("Rescale", {}, (3, 7, 11)),
    ("Cal", {"residual": "rescalenet", "sigma_reparam": True}, (3, 7)),
    pytest.param(
      "Derf",
      {"residual": "skipinit", "qk_norm": True},
      (11,),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "BN2",
      {"residual": "layerscale", "init": "unit"},
      (11,),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_resumed_run_equals_an_uninterrupted_run(
  tiny_config, tmp_path, norm, options, stops
):
  tiny_config.model.norm = norm
  tiny_config.model.update(options)
  tiny_config.calibration = "all"
  tiny_config.accum_steps = 1 if norm in ("LN", "GN", "Derf") else 3
  train.train_and_evaluate(tiny_config, tmp_path / "a")
  for step_number in stops:
    with interruption.after_step(step_number):
      train.train_and_evaluate(tiny_config, tmp_path / "b")
  train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
  "norm, recipe",
  [
    *(("BN", "adamw"), ("BN", "float16")),
    pytest.param("Rescale", "sgd", marks=pytest.mark.slow),
    pytest.param("Rescale", "muon", marks=pytest.mark.slow),
  ],
)
def test_resumed_run_of_any_recipe_equals_an_uninterrupted_run(
  tiny_config, tmp_path, norm, recipe
):
  tiny_config.model.norm = norm
  tiny_config.update_from_flattened_dict(recipes.RECIPES[recipe])
  train.train_and_evaluate(tiny_config, tmp_path / "a")
  with interruption.after_step(7):
    train.train_and_evaluate(tiny_config, tmp_path / "b")
  train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert_same_run(tmp_path / "a", tmp_path / "b")
  # The best checkpoint holds the evaluated averages.
  tiny_config.eval_weights = "best"
  result = evaluate_run.evaluate_run(tiny_config, tmp_path / "a")
  found = lines(tmp_path / "a")
  assert result["loss"] in [
    pytest.approx(x["test/loss"], rel=1e-5) for x in found if "test/loss" in x
  ]
  assert all(np.isfinite(list(x.values())).all() for x in found)


def test_incomplete_line_of_metrics_is_rewritten(
  tiny_config, default_run, tmp_path
):
  with interruption.after_step(9):
    train.train_and_evaluate(tiny_config, tmp_path / "b")
  with open(tmp_path / "b" / "metrics.jsonl", "a", encoding="utf-8") as f:
    f.write('{"step": 9, "train/lo')
  train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert_same_run(default_run, tmp_path / "b")


def test_a_signal_during_evaluation_saves_and_evaluates_later(
  tiny_config, default_run, tmp_path, monkeypatch
):
  real = evaluate.Evaluator.__call__

  def interrupted(self, params, batch_stats, stopped):
    stop.requested = True
    return real(self, params, batch_stats, stopped)

  stop = preemption.StopSignal()
  monkeypatch.setattr(train.preemption, "StopSignal", lambda: stop)
  monkeypatch.setattr(evaluate.Evaluator, "__call__", interrupted)
  assert train.train_and_evaluate(tiny_config, tmp_path / "b") is None
  assert [x["step"] for x in lines(tmp_path / "b")] == [2, 4]
  monkeypatch.undo()
  train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert_same_run(default_run, tmp_path / "b")


def test_postponed_evaluation_is_written_once(
  tiny_config, default_run, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(evaluate.Evaluator, "__call__", lambda *args: stop_now())
    stop = preemption.StopSignal()

    def stop_now():
      stop.requested = True

    patch.setattr(train.preemption, "StopSignal", lambda: stop)
    train.train_and_evaluate(tiny_config, tmp_path / "b")
  # Saved at step 5 without evaluation; evaluated now and again after a crash.
  with interruption.after_step(7):
    train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert 5 in [x["step"] for x in lines(tmp_path / "b") if "test/loss" in x]
  train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert_same_run(default_run, tmp_path / "b")


def test_finished_run_is_not_trained_again(
  tiny_config, default_run, tmp_path, monkeypatch
):
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  result = json.loads((tmp_path / "result.json").read_text())
  monkeypatch.setattr(dataset, "load", None)
  assert train.train_and_evaluate(tiny_config, tmp_path) == result


def test_missing_result_is_rewritten_from_the_last_checkpoint(
  tiny_config, default_run, tmp_path
):
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  result = json.loads((tmp_path / "result.json").read_text())
  before = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "result.json").unlink()
  assert train.train_and_evaluate(tiny_config, tmp_path) == result
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_changed_config_of_a_run_is_refused(tiny_config, default_run, tmp_path):
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  tiny_config.model.norm = "LN"
  tiny_config.base_lr = 0.1
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(errors.UserError) as e:
    train.train_and_evaluate(tiny_config, tmp_path)
  assert "model.norm ('Rescale' there, 'LN' now)" in str(e.value)
  assert "base_lr (0.05 there, 0.1 now)" in str(e.value)
  assert (tmp_path / "config.json").read_bytes() == before


def test_runs_are_equal_only_with_equal_seeds(tiny_config, tmp_path):
  tiny_config.total_steps = 4
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    tiny_config.seed = seed
    train.train_and_evaluate(tiny_config, tmp_path / name)
  assert_same_run(tmp_path / "a", tmp_path / "b")
  assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_nonfinite_training_loss_stops_the_run(
  tiny_config, tmp_path, monkeypatch
):
  real = train_step.loss_fn

  def poisoned(params, batch_stats, images, labels, dropout_key, **kwargs):
    loss, batch_stats = real(
      params, batch_stats, images, labels, dropout_key, **kwargs
    )
    # Batches do not repeat, so the step is unique.
    return jax.numpy.where(_is_batch_of_step(labels, 7), jax.numpy.nan, loss), (
      batch_stats
    )

  def _is_batch_of_step(labels, number):
    places = dataset.batch_indices(0, number, 48, len(train_labels))
    return (labels == train_labels[places]).all()

  train_labels = dataset.load("digits", tiny_config.tfds_data_dir).train.labels
  monkeypatch.setattr(train_step, "loss_fn", poisoned)
  with pytest.raises(errors.UserError, match="step 7: .*loss nan.*step 4"):
    train.train_and_evaluate(tiny_config, tmp_path)
  assert all(np.isfinite(x).all() for x in weights(tmp_path))
  assert [x["step"] for x in lines(tmp_path)] == [2, 4, 5, 6]
  assert result_lib.read(tmp_path)["status"] == "diverged"


def test_run_starts_from_a_pretrained_file(
  tiny_config, default_run, tmp_path, caplog
):
  params, batch_stats, _ = checkpoint.load_variables(default_run, "latest")
  path = tmp_path / "a.npz"
  npz.save(path, params, batch_stats)
  tiny_config.pretrained_path = str(path)
  state = initial_state.create(experiment.create(tiny_config))
  for x, y in zip(
    jax.tree.leaves((state.params, state.batch_stats)),
    jax.tree.leaves((params, batch_stats)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)

  tiny_config.eval_weights = "pretrained"
  result = evaluate_run.evaluate_run(tiny_config, tmp_path / "b")
  assert result["accuracy"] == lines(default_run)[-1]["test/accuracy"]
  assert "is resized" not in caplog.text
  tiny_config.image_size = 16
  evaluate_run.evaluate_run(tiny_config, tmp_path / "c")
  assert "position embedding is resized to image_size=16" in caplog.text


@pytest.mark.parametrize(
  "source, norm, words",
  [
    ("DyT", "LN", "LayerNorm_0"),
    pytest.param("LN", "Cal", "alpha", marks=pytest.mark.slow),
    ("BN", "LN", "the model has no array batch_stats"),
    ("LN", "Identity", "the model has no array .*encoder_norm/bias"),
  ],
)
def test_eval_mode_refuses_a_file_of_another_norm(
  source, norm, words, tiny_config, tmp_path
):
  tiny_config.model.norm = source
  state = experiment.create(tiny_config).init_state()
  path = tmp_path / "a.npz"
  npz.save(path, state.params, state.batch_stats)
  tiny_config.update({"pretrained_path": str(path)})
  tiny_config.eval_weights = "pretrained"
  assert (
    evaluate_run.evaluate_run(tiny_config, tmp_path / "a")["examples"] == 360
  )
  tiny_config.model.norm = norm
  with pytest.raises(errors.UserError, match=f"cannot be evaluated.*{words}"):
    evaluate_run.evaluate_run(tiny_config, tmp_path / "b")


def test_nonfinite_test_loss_stops_the_run(tiny_config, tmp_path, monkeypatch):
  real = evaluate.Evaluator.__call__
  results = iter([False, True])

  def diverging(self, *args):
    result = real(self, *args)
    if next(results):
      return dataclasses.replace(result, loss=float("nan"))
    return result

  monkeypatch.setattr(evaluate.Evaluator, "__call__", diverging)
  with pytest.raises(errors.UserError, match="step 10.*loss nan.*step 8"):
    train.train_and_evaluate(tiny_config, tmp_path)
  assert [x["step"] for x in lines(tmp_path) if "test/loss" in x] == [5]
  assert checkpoint.load_variables(tmp_path, "best")[2] == 5
  assert checkpoint.load_variables(tmp_path, "latest")[2] == 8


def test_a_diverged_run_is_not_trained_again(tiny_config, tmp_path):
  tiny_config.base_lr = 1e30
  with pytest.raises(errors.UserError, match="training diverged") as first:
    train.train_and_evaluate(tiny_config, tmp_path)
  result = result_lib.read(tmp_path)
  assert result["status"] == "diverged" and result["error"] == str(first.value)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  with pytest.raises(errors.UserError) as second:
    train.train_and_evaluate(tiny_config, tmp_path)
  assert str(second.value) == f"{tmp_path}: {first.value}"
  after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  assert after == before


def test_a_diverged_run_without_checkpoints_may_change_its_config(
  tiny_config, tmp_path
):
  tiny_config.base_lr = 1e30
  with pytest.raises(errors.UserError, match="diverged.*; no checkpoint was"):
    train.train_and_evaluate(tiny_config, tmp_path)
  tiny_config.base_lr = 0.1
  assert train.train_and_evaluate(tiny_config, tmp_path)["status"] == "finished"


def test_a_folder_without_its_config_is_refused(
  tiny_config, default_run, tmp_path
):
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").unlink()
  with pytest.raises(errors.UserError, match=r"without its config\.json"):
    train.train_and_evaluate(tiny_config, tmp_path)
  (tmp_path / "result.json").unlink()
  with pytest.raises(errors.UserError, match=r"without its config\.json"):
    evaluate_run.evaluate_run(tiny_config, tmp_path)


def test_a_run_that_saved_nothing_may_change_its_config(tiny_config, tmp_path):
  with interruption.after_step(2):
    train.train_and_evaluate(tiny_config, tmp_path)
  tiny_config.seed = 5
  train.train_and_evaluate(tiny_config, tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5
  assert [x["step"] for x in lines(tmp_path)][:2] == [2, 4]


def test_a_best_checkpoint_alone_keeps_its_config(
  tiny_config, default_run, tmp_path
):
  """SIGKILL between first evaluation and first checkpoint leaves this state."""
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  (tmp_path / "result.json").unlink()
  shutil.rmtree(tmp_path / "checkpoints" / "last")
  tiny_config.model.gelu = "tanh"
  diverged = json.dumps(result_lib.diverged(5, "loss nan"))
  for text in (None, diverged):
    if text:
      (tmp_path / "result.json").write_text(text)
    for start in (train.train_and_evaluate, evaluate_run.evaluate_run):
      with pytest.raises(errors.UserError, match="another config: model.gelu"):
        start(tiny_config, tmp_path)


@pytest.mark.parametrize("which, at", [("best", "best"), ("latest", "last")])
def test_eval_mode_gives_the_accuracy_of_training(
  tiny_config, default_run, tmp_path, which, at
):
  shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)
  trained = json.loads((tmp_path / "result.json").read_text())
  tiny_config.eval_weights = which
  tiny_config.batch_eval = 7
  result = evaluate_run.evaluate_run(tiny_config, tmp_path)
  assert result["step"] == trained[f"{at}_step"]
  assert result["accuracy"] == trained[f"{at}_accuracy"]
  assert result["examples"] == 360
  assert json.loads((tmp_path / "eval.json").read_text()) == result


def test_run_without_tensorflow_has_no_event_files(
  tiny_config, tmp_path, monkeypatch, caplog
):
  def missing():
    raise errors.UserError("cannot import TensorFlow")

  monkeypatch.setattr(metric_writers.tensorflow_cpu, "load", missing)
  assert train.train_and_evaluate(tiny_config, tmp_path)
  assert len(lines(tmp_path)) == 9
  assert not list(tmp_path.glob("events*"))
  warnings = [r for r in caplog.records if "TensorBoard" in r.getMessage()]
  assert len(warnings) == 1


def test_keeps_the_last_checkpoints_and_the_best(tiny_config, tmp_path):
  tiny_config.keep_checkpoints = 2
  result = train.train_and_evaluate(tiny_config, tmp_path)
  assert json.loads((tmp_path / "result.json").read_text()) == result

  def kept(kind):
    folder = tmp_path / "checkpoints" / kind
    return sorted(int(p.name) for p in folder.iterdir())

  assert kept("last") == [8, 12]
  assert kept("best") == [result["best_step"]]


def test_attention_images_are_written_to_tensorboard(
  tiny_config, default_run, tmp_path
):
  tiny_config.log_attention = True
  draw = attention_plots.draw_during_training
  train.train_and_evaluate(tiny_config, tmp_path / "with", draw)
  assert_same_run(default_run, tmp_path / "with")
  board = event_accumulator.EventAccumulator(
    str(tmp_path / "with"), {"tensors": 0}
  )
  board.Reload()
  pictures = [tag for tag in board.Tags()["tensors"] if "attention/" in tag]
  assert pictures == [f"attention/{kind}" for kind in attention_plots.KINDS]
  for tag in pictures:
    found = board.Tensors(tag)
    assert [event.step for event in found] == [5, 10, 12]
    images = [event.tensor_proto.string_val[2] for event in found]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert len(set(images)) == 3


def test_throughput_is_written_only_if_measured(tiny_config, tmp_path):
  tiny_config.progress_every = 1
  train.train_and_evaluate(tiny_config, tmp_path)
  board = event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0})
  board.Reload()
  found = [x.step for x in board.Tensors("train/images_per_second")]
  assert found[0] > 1  # Step 1 includes compilation.
  assert found[-1] == 12


def test_failing_attention_image_does_not_stop_a_run(
  tiny_config, tmp_path, caplog
):
  def fail(*args):
    raise ValueError("no ink")

  tiny_config.log_attention = True
  with caplog.at_level("WARNING", "rescalevit_jax"):
    result = train.train_and_evaluate(tiny_config, tmp_path, fail)
  assert result["last_step"] == 12
  assert "no ink" in caplog.text
