"""Dynamic loss scaling for training in float16."""

import functools
import json
import re

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax import predict
from rescalevit_jax.augment import preprocess
from rescalevit_jax.models import vit_config
from rescalevit_jax.optim import loss_scale
from rescalevit_jax.optim import optimizers
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.training import evaluate_run
from rescalevit_jax.training import experiment
from rescalevit_jax.training import train
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib
from rescalevit_jax.training import trainer

ABSURD = 2.0**60
SIZE = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, 12).astype(np.int32)
SGD = optimizers.sgd(
  lambda count: 0.1 / (1 + count),
  momentum=0.9,
  weight_decay=0.0,
  grad_norm_clip=0.1,
)


@functools.cache
def model_of(dtype):
  return models.create(
    "ViT-XS_4",
    num_classes=3,
    norm="BN",
    image_size=SIZE,
    hidden_size=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=1,
    dropout_rate=0.0,
    dtype=dtype,
  )


@functools.cache
def train_step_of(dtype):
  return jax.jit(
    functools.partial(
      train_step_lib.train_step,
      model=model_of(dtype),
      optimizer=SGD,
      augment=preprocess.Augment(crop=False),
      image_size=SIZE,
      ema_decay=0.9,
    )
  )


@functools.cache
def scratch_of(dtype):
  return train_state.init_state(
    model_of(dtype), SGD, SIZE, seed=0, averages=True
  )


@functools.cache
def started(dtype):
  """Return a state after one step, where nothing is zero."""
  return train_once(scratch_of(dtype), dtype)[0]


def with_scale(state, **changes):
  return state.replace(loss_scale=state.loss_scale.replace(**changes))


def start_with(scale):
  return with_scale(started("float16"), scale=jnp.float32(scale))


def train_once(state, dtype="float16", accum_steps=1):
  images = IMAGES.reshape(accum_steps, -1, *IMAGES.shape[1:])
  labels = LABELS.reshape(accum_steps, -1)
  return train_step_of(dtype)(state, images, labels, 0)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype


@functools.partial(jax.jit, static_argnames="dtype")
def gradient(state, dtype="float16"):
  grads = train_step_lib.gradient(
    state,
    IMAGES[None],
    LABELS[None],
    0,
    model=model_of(dtype),
    augment=preprocess.Augment(crop=False),
    image_size=SIZE,
  )[1]
  return flatten_util.ravel_pytree(grads)[0]


# One step.


def test_only_float16_has_a_loss_scale():
  for dtype in ("float32", "bfloat16"):
    assert scratch_of(dtype).loss_scale is None
  assert scratch_of("float16").loss_scale.scale == 2**10


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_an_overflow_changes_only_the_scale(accum_steps):
  before = start_with(ABSURD)
  after, metrics = train_once(before, accum_steps=accum_steps)
  scaling = after.loss_scale
  # Each micro-batch halves the scale.
  assert scaling.scale == ABSURD / 2**accum_steps
  assert (scaling.skipped_steps, scaling.fin_steps) == (1, 0)
  assert after.step == before.step + 1
  assert_equal(
    after.replace(step=before.step, loss_scale=before.loss_scale), before
  )
  assert metrics["loss_scale"] == scaling.scale
  assert metrics["skipped_steps"] == 1
  assert not np.isfinite(metrics["grad_norm"])
  _, usual = train_once(started("float16"), accum_steps=accum_steps)
  assert np.isfinite(usual["grad_norm"])
  assert metrics["loss"] == pytest.approx(float(usual["loss"]), rel=1e-6)


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_an_overflow_of_sams_first_gradient_counts_once(accum_steps):
  """The overflow makes the weights of the second gradient nonfinite."""
  step = functools.partial(
    train_step_lib.gradient,
    model=model_of("float16"),
    augment=preprocess.Augment(crop=False),
    image_size=SIZE,
    sam_rho=0.05,
  )
  images = IMAGES.reshape(accum_steps, -1, *IMAGES.shape[1:])
  labels = LABELS.reshape(accum_steps, -1)
  *_, scaling = jax.jit(step)(start_with(ABSURD), images, labels, 0)
  assert scaling.scale == ABSURD / 2**accum_steps
  *_, scaling = jax.jit(step)(start_with(2.0**10), images, labels, 0)
  assert scaling.fin_steps == started("float16").loss_scale.fin_steps + (
    2 * accum_steps
  )


def test_the_loss_is_finite_if_the_scaled_loss_overflows():
  _, metrics = train_once(start_with(3e38))
  assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_finite_gradient_is_applied_and_counted(accum_steps):
  before = started("float16")
  after, metrics = train_once(before, accum_steps=accum_steps)
  scaling = after.loss_scale
  assert scaling.scale == before.loss_scale.scale
  assert scaling.fin_steps == before.loss_scale.fin_steps + accum_steps
  assert metrics["skipped_steps"] == 0
  full, expected = train_once(
    started("float32"), "float32", accum_steps=accum_steps
  )
  assert set(expected) == {"loss", "grad_norm"}
  assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-3)
  # The unscaled norm, before clipping to 0.1.
  assert expected["grad_norm"] > 0.2
  norm = float(expected["grad_norm"])
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
  for x, y in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(full.params), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=2e-4)


def test_scale_grows_after_2000_finite_gradients():
  before = with_scale(started("float16"), fin_steps=jnp.int32(2000))
  after, _ = train_once(before)
  assert after.loss_scale.scale == 2 * before.loss_scale.scale
  assert after.loss_scale.fin_steps == 0


def test_small_gradients_vanish_without_the_scale():
  exact = gradient(started("float32"), "float32")

  def error(scale):
    found = gradient(start_with(scale))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)

  assert error(2**10) < 5e-3
  assert error(2**-14) > 10 * error(2**10)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_averages_exclude_skipped_steps(dtype):
  scratch = scratch_of("float16")
  state, _ = train_once(with_scale(scratch, scale=jnp.float32(ABSURD)))
  assert state.loss_scale.skipped_steps == 1
  if dtype == "float16":
    state = with_scale(state, scale=scratch.loss_scale.scale)
  else:
    state = state.replace(loss_scale=None)
  state, _ = train_once(state, dtype)
  # The first update copies the latest values.
  for x, y in zip(
    jax.tree.leaves(state.ema["params"]),
    jax.tree.leaves(state.params),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=1e-6)


# Whole runs.


@pytest.fixture
def start_at(monkeypatch):
  """Make runs start from another loss scale."""

  def arrange(scale):
    monkeypatch.setattr(loss_scale, "_INITIAL_SCALE", scale)

  return arrange


@pytest.fixture
def stop_at(monkeypatch):
  """End a run during a step; its last checkpoint is of step 4 or later."""

  def arrange(number):
    real = trainer.Trainer._step

    def stopping(self, *batch):
      real(self, *batch)
      if self._progress.step == number:
        monkeypatch.setattr(trainer.Trainer, "_step", real)
        raise InterruptedError

    monkeypatch.setattr(trainer.Trainer, "_step", stopping)

  return arrange


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  assert not re.search("NaN|Infinity", text)
  found = [json.loads(line) for line in text.splitlines()]
  return {x["step"]: x for x in found if "train/loss" in x}


def saved(workdir, config):
  """Return the state from which a run would resume."""
  with checkpoint.Checkpoints(workdir) as checkpoints:
    abstract = experiment.create(config).abstract_state()
    items, progress = checkpoints.restore(abstract.to_checkpoint())
    return abstract.from_checkpoint(items, progress.skipped_steps), progress


@pytest.mark.parametrize(
  "norm", ["LN", pytest.param("Rescale", marks=pytest.mark.slow)]
)
def test_each_loss_of_200_steps_is_within_a_percent_of_float32s(
  norm, tiny_config
):
  # Compare each step. With larger learning rates, rounding errors accumulate,
  # more in bfloat16 than in float16.
  tiny_config.update({"total_steps": 2000, "warmup_steps": 100})
  tiny_config.base_lr = 0.02
  tiny_config.model.update({"norm": norm, "hidden_size": 32, "mlp_dim": 64})
  tiny_config.augment.min_area = 0.6
  losses = {}
  for dtype in ("float32", "float16"):
    tiny_config.dtype = dtype
    found = experiment.create(tiny_config)
    state, train_step = found.init_state(), found.train_step(1)
    metrics = []
    steps = range(1, 201)
    with found.train_loader.batches(found.train_indices, steps) as batches:
      for images, labels in batches:
        state, new = train_step(state, images, labels, np.uint32(0))
        metrics.append(new["loss"])
    losses[dtype] = np.asarray(metrics)
  assert state.loss_scale.skipped_steps == 0
  assert losses["float32"][-20:].mean() < 0.9 * losses["float32"][:20].mean()
  assert (losses["float16"] != losses["float32"]).any()
  np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=0.01)


def test_a_run_reports_skipped_steps_and_resumes_bit_for_bit(
  tiny_config, tmp_path, start_at, stop_at, caplog, shared_programs
):
  start_at(2.0**26)
  tiny_config.dtype = "float16"
  tiny_config.accum_steps = 2
  tiny_config.ema_decay = 0.9
  tiny_config.progress_every = 1
  with caplog.at_level("INFO", "rescalevit_jax"):
    result = train.train_and_evaluate(tiny_config, tmp_path / "a")
  found = lines(tmp_path / "a")
  counts = [found[n]["train/skipped_steps"] for n in range(1, 13)]
  skipped = counts[-1]
  assert result["skipped_steps"] == skipped
  assert counts[:3] == [1, 2, 3] and skipped < 8
  messages = [r.getMessage() for r in caplog.records]
  rates = []
  for n in range(1, 13):
    scale = found[n]["train/loss_scale"]
    said = f"step {n} skipped: gradient overflowed float16;"
    said = f"{said} loss scale is now {scale:g}"
    was_skipped = counts[n - 1] > (n > 1 and counts[n - 2])
    assert (said in messages) == was_skipped
    assert ("train/grad_norm" in found[n]) == (not was_skipped)
    if not was_skipped:
      rates.append(found[n]["train/lr"])
  # The schedule excludes skipped steps: three warm-up steps here.
  np.testing.assert_allclose(rates[:3], [0.05 / 3, 0.1 / 3, 0.05], rtol=1e-6)

  for number in (3, 7):
    stop_at(number)
    with pytest.raises(InterruptedError):
      train.train_and_evaluate(tiny_config, tmp_path / "b")
  again = train.train_and_evaluate(tiny_config, tmp_path / "b")
  assert again["skipped_steps"] == skipped
  a, b = (tmp_path / x / "metrics.jsonl" for x in "ab")
  assert a.read_bytes() == b.read_bytes()
  (state_a, progress), (state_b, _) = (
    saved(tmp_path / x, tiny_config) for x in "ab"
  )
  assert_equal(state_a, state_b)
  assert state_a.loss_scale.skipped_steps == progress.skipped_steps == skipped
  assert state_a.loss_scale.fin_steps > 0
  counted = [x for x in jax.tree.leaves(state_a.opt_state) if x.ndim == 0]
  assert counted == [12 - skipped]
  # Eight steps that were not skipped calibrate Rescale.
  block = state_a.batch_stats["Transformer"]["encoderblock_0"]
  assert block["Rescale_0"]["count"] == 8

  tiny_config.eval_weights = "latest"
  evaluated = evaluate_run.evaluate_run(tiny_config, tmp_path / "a")
  assert evaluated["accuracy"] == result["last_accuracy"]
  probabilities = predict.load(tmp_path / "a")([IMAGES[0]])
  assert probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_a_run_resumes_if_auto_selects_another_dtype(
  tiny_config, tmp_path, start_at, stop_at, monkeypatch, caplog
):
  start_at(2.0**30)
  tiny_config.dtype = "auto"
  tiny_config.model.norm = "LN"
  for dtype, number, scale in (
    ("float16", 5, 2.0**26),  # Skips four steps, then saves.
    ("float32", 9, None),
    ("float16", 12, 2.0**30),
  ):
    monkeypatch.setattr(vit_config, "choose_dtype", lambda d=dtype: d)
    stop_at(number)
    with pytest.raises(InterruptedError):
      train.train_and_evaluate(tiny_config, tmp_path)
    state, progress = saved(tmp_path, tiny_config)
    assert progress.step == {5: 4, 9: 8, 12: 8}[number]
    if scale is None:
      assert state.loss_scale is None
    else:
      assert state.loss_scale.scale == scale
      assert state.loss_scale.skipped_steps == 4
    assert progress.skipped_steps == 4
  assert progress.dtype == "float16 then float32"
  assert "the run continues in float32 after float16" in caplog.text


def test_a_nonfinite_gradient_at_the_smallest_scale_ends_the_run(
  tiny_config, tmp_path, start_at, monkeypatch
):
  real = train_step_lib.loss_fn

  def poisoned(params, *args, **kwargs):
    loss, aux = real(params, *args, **kwargs)
    return loss + jnp.sqrt(0 * params["cls"].sum()), aux  # The slope is NaN.

  monkeypatch.setattr(train_step_lib, "loss_fn", poisoned)
  start_at(4.0)
  tiny_config.dtype = "float16"
  with pytest.raises(errors.UserError) as e:
    train.train_and_evaluate(tiny_config, tmp_path)
  assert re.fullmatch(
    r"step 3: training diverged \(loss \d\.\d+, gradient norm nan,"
    r" loss scale 0\.5\);"
    r".* try a smaller base_lr or grad_norm_clip, or dtype float32, in .*",
    str(e.value),
  )
  assert list(lines(tmp_path)) == [2]
