"""The training and evaluation steps as pure functions."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import models
from rescalevit_jax.augment import mixing
from rescalevit_jax.augment import preprocess
from rescalevit_jax.distributed import sharding
from rescalevit_jax.optim import groups
from rescalevit_jax.optim import optimizers
from rescalevit_jax.training import experiment
from rescalevit_jax.training import train_state
from rescalevit_jax.training import train_step as train_step_lib

SIZE = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, 24).astype(np.int32)
# 12 of the 24 images, in any order.
BATCH = np.random.default_rng(2).permutation(24)[:12].astype(np.int32)
WHOLE = preprocess.Augment(crop=False)
CROPS = preprocess.Augment(flip=True)


@functools.cache
def model_of(norm, dropout_rate=0.0):
  return models.create(
    "ViT-B_16",
    num_classes=3,
    norm=norm,
    image_size=SIZE,
    patch_size=4,
    hidden_size=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=1,
    dropout_rate=dropout_rate,
  )


# Gradient descent with learning rate 1: the update is the gradient.
DESCENT = optimizers.sgd(
  optax.constant_schedule(1.0),
  momentum=0.0,
  weight_decay=0.0,
  grad_norm_clip=0,
)


@functools.cache
def scratch_of(norm):
  return train_state.init_state(model_of(norm), DESCENT, SIZE, seed=0)


@functools.cache
def start_of(norm):
  """Return a random state without zeros.

  Normalizing a class token of zeros would magnify rounding errors.
  """
  rng = np.random.default_rng(3)
  state = scratch_of(norm)

  def add_noise(x):
    return x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)

  return state.replace(params=jax.tree.map(add_noise, state.params))


@functools.cache
def train_step_of(
  norm,
  dropout_rate=0.0,
  settings=WHOLE,
  sgd=DESCENT,
  mixing=mixing.NOTHING,
  sam_rho=0.0,
  freeze=lambda params: params,
):
  train_step = functools.partial(
    train_step_lib.train_step,
    model=model_of(norm, dropout_rate),
    optimizer=sgd,
    augment=settings,
    image_size=SIZE,
    mixing=mixing,
    sam_rho=sam_rho,
    freeze=freeze,
  )
  return jax.jit(train_step)


def train_once(norm="LN", indices=BATCH[None], state=None, seed=0, **kwargs):
  state = start_of(norm) if state is None else state
  train_step = train_step_of(norm, **kwargs)
  return train_step(state, IMAGES[indices], LABELS[indices], seed)


def gradient(state, norm="LN"):
  return jax.tree.map(jnp.subtract, start_of(norm).params, state.params)


def pixels(indices):
  return IMAGES[indices].astype(np.float32) / 127.5 - 1


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def check_close(a, b, atol=1e-5):
  close = functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5)
  jax.tree.map(close, a, b)


def test_frozen_parameters_do_not_count_in_the_gradient_norm():
  table = groups.parse("head/*:1 *:0")
  freeze = functools.partial(groups.freeze, table)
  state, metrics = train_once(freeze=freeze)
  usual, _ = train_once()
  found, expected = gradient(state), gradient(usual)
  check_close(found["head"], expected["head"])
  for key in found.keys() - {"head"}:
    assert not any(map(np.any, jax.tree.leaves(found[key]))), key
  norm = optax.tree.norm(expected["head"])
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  config = config_lib.default()
  config.update({"model_name": "ViT-XS_4", "lr_mult": "head/*:1 *:0"})
  made = experiment.build(config, sharding.create_mesh(), 10)
  assert made.gradient_options()["freeze"].args == (table,)


# Initial state.


def test_initial_state_depends_on_the_seed_only():
  again = train_state.init_state(model_of("LN"), DESCENT, SIZE, seed=0)
  other = train_state.init_state(model_of("LN"), DESCENT, SIZE, seed=1)
  assert same(again, scratch_of("LN"))
  assert not same(other.params, again.params)
  assert again.step == 0
  assert again.step.dtype == jnp.int32


def test_initial_state_has_the_norms_batch_stats():
  assert scratch_of("LN").batch_stats == {}
  counts = flax.traverse_util.flatten_dict(
    scratch_of("Rescale").batch_stats, sep="/"
  )
  assert all(counts[k] == 0 for k in counts if k.endswith("count"))


# Training.


def test_step_is_a_function_of_state_and_batch():
  kwargs = dict(norm="Rescale", dropout_rate=0.3, settings=CROPS)
  before = jax.tree.map(np.array, start_of("Rescale"))
  first = train_once(**kwargs)
  second = train_once(**kwargs)
  assert same(first, second)
  assert same(before, start_of("Rescale"))


def test_step_counter_is_incremented():
  state, _ = train_once()
  assert state.step == 1
  state, _ = train_once(state=state)
  assert state.step == 2
  assert state.step.dtype == jnp.int32


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_loss_and_gradient_of_the_selected_images(norm):
  start = start_of(norm)

  def loss(params):
    logits, new = model_of(norm).apply(
      {"params": params, "batch_stats": start.batch_stats},
      pixels(BATCH),
      train=True,
      mutable=["batch_stats"],
    )
    log_probabilities = jax.nn.log_softmax(logits)
    picked = log_probabilities[np.arange(12), LABELS[BATCH]]
    return -picked.mean(), new.get("batch_stats", {})

  (want, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    start.params
  )
  state, metrics = train_once(norm)
  assert set(metrics) == {"loss", "grad_norm"}
  assert metrics["loss"] == pytest.approx(float(want), abs=1e-5)
  norm_by_hand = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
  assert metrics["grad_norm"] == pytest.approx(norm_by_hand, rel=1e-4)
  check_close(gradient(state, norm), grads)
  check_close(state.batch_stats, statistics, atol=1e-6)


def test_gradient_norm_is_measured_before_clipping():
  clipping = optimizers.sgd(
    optax.constant_schedule(1.0),
    momentum=0.0,
    weight_decay=0.0,
    grad_norm_clip=0.01,
  )
  state, metrics = train_once(sgd=clipping)
  assert optax.global_norm(gradient(state)) == pytest.approx(0.01, rel=1e-3)
  _, unclipped = train_once()
  assert metrics["grad_norm"] == pytest.approx(float(unclipped["grad_norm"]))
  assert metrics["grad_norm"] > 0.1


def test_dropout_differs_between_seeds_and_steps():
  losses = {
    float(train_once(dropout_rate=0.3, seed=seed)[1]["loss"]) for seed in (0, 1)
  }
  later = start_of("LN").replace(step=jnp.int32(1))
  losses.add(float(train_once(dropout_rate=0.3, state=later)[1]["loss"]))
  assert len(losses) == 3
  plain = [float(train_once(seed=seed)[1]["loss"]) for seed in (0, 1)]
  assert plain[0] == plain[1]


def test_crops_differ_between_seeds_steps_and_images():
  losses = {
    float(train_once(settings=CROPS, seed=seed)[1]["loss"]) for seed in (0, 1)
  }
  later = start_of("LN").replace(step=jnp.int32(1))
  losses.add(float(train_once(settings=CROPS, state=later)[1]["loss"]))
  # Twelve crops of one image give a different loss than one crop.
  losses.add(float(train_once(indices=np.zeros((1, 12), np.int32))[1]["loss"]))
  repeated = np.zeros((1, 12), np.int32)
  losses.add(float(train_once(settings=CROPS, indices=repeated)[1]["loss"]))
  assert len(losses) == 5


@pytest.mark.parametrize("settings", [WHOLE, CROPS])
def test_accumulation_gives_the_gradient_of_the_whole_batch(settings):
  # An image's crop depends on its index in the batch.
  whole, metrics = train_once(settings=settings)
  parts, others = train_once(settings=settings, indices=BATCH.reshape(3, 4))
  check_close(gradient(parts), gradient(whole))
  check_close(others, metrics)
  assert parts.step == 1


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_each_micro_batch_updates_the_running_statistics(norm):
  start = start_of(norm)
  statistics, losses = start.batch_stats, []
  for indices in BATCH.reshape(3, 4):
    loss, statistics = train_step_lib.loss_fn(
      start.params,
      statistics,
      pixels(indices),
      LABELS[indices],
      jax.random.key(0),
      model=model_of(norm),
    )
    losses.append(loss)
  state, metrics = train_once(norm, indices=BATCH.reshape(3, 4))
  check_close(state.batch_stats, statistics, atol=1e-6)
  assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
  if norm == "Rescale":
    block = state.batch_stats["Transformer"]["encoderblock_0"]
    assert block["Rescale_2"]["count"] == 3


def test_micro_batches_have_different_dropout_masks():
  # Compare two equal micro-batches with one.
  twice = np.stack([BATCH, BATCH])
  once, _ = train_once(dropout_rate=0.3)
  both, _ = train_once(dropout_rate=0.3, indices=twice)
  other, _ = train_once(indices=twice)
  check_close(gradient(other), gradient(train_once()[0]))
  difference = jax.tree.map(jnp.subtract, gradient(both), gradient(once))
  assert optax.global_norm(difference) > 1e-2


def test_sam_takes_the_gradient_at_the_ascended_weights():
  """Loss and batch statistics are of the first gradient only."""
  rho, start = 0.5, start_of("Rescale")
  settings = {"dropout_rate": 0.3, "settings": CROPS}
  batch = {"indices": BATCH.reshape(3, 4), "norm": "Rescale", **settings}
  usual, of_usual = train_once(**batch)
  grads = jax.tree.map(jnp.subtract, start.params, usual.params)
  factor = rho / of_usual["grad_norm"]
  ascended = jax.tree.map(lambda w, g: w + factor * g, start.params, grads)
  at_ascended, of_ascended = train_once(
    state=start.replace(params=ascended), **batch
  )
  want = jax.tree.map(jnp.subtract, ascended, at_ascended.params)
  got, of_sam = train_once(sam_rho=rho, **batch)
  check_close(jax.tree.map(jnp.subtract, start.params, got.params), want)
  check_close(got.batch_stats, usual.batch_stats, atol=1e-6)
  np.testing.assert_allclose(of_sam["loss"], of_usual["loss"], rtol=1e-6)
  norms = of_sam["grad_norm"], of_ascended["grad_norm"]
  np.testing.assert_allclose(*norms, rtol=1e-4)
  assert norms[0] > 1.05 * of_usual["grad_norm"]


def test_nonfinite_loss_appears_in_the_metrics():
  start = start_of("LN")
  broken = start.replace(
    params={**start.params, "cls": start.params["cls"] * jnp.nan}
  )
  state, metrics = train_once(state=broken)
  assert not np.isfinite(metrics["loss"])
  assert not np.isfinite(metrics["grad_norm"])
  assert state.step == 1


# Averages and soft labels.


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_ema_averages_parameters_and_batch_stats(norm):
  start = start_of(norm)
  averaging = start.replace(ema=jax.tree.map(jnp.copy, start.evaluated))
  plain = train_step_lib.train_step
  small = optimizers.sgd(
    optax.constant_schedule(0.1), momentum=0, weight_decay=0, grad_norm_clip=0
  )
  kwargs = dict(
    model=model_of(norm), optimizer=small, augment=WHOLE, image_size=SIZE
  )
  train = jax.jit(functools.partial(plain, ema_decay=0.8, **kwargs))
  batch = IMAGES[BATCH.reshape(1, 12)], LABELS[BATCH.reshape(1, 12)]
  state, states = averaging, []
  for _ in range(3):
    state, _ = train(state, *batch, 0)
    states.append(jax.tree.map(np.array, state))
  weights = np.array([0.64, 0.8, 1.0]) / 2.44

  def average(*values):
    if np.issubdtype(values[0].dtype, np.integer):
      return values[-1]
    return sum(w * x for w, x in zip(weights, values, strict=True))

  trained = [{"params": s.params, "batch_stats": s.batch_stats} for s in states]
  check_close(state.ema, jax.tree.map(average, *trained))
  assert state.evaluated is state.ema
  assert not same(state.ema["params"], state.params)
  # Averaging does not change training.
  plain, _ = jax.jit(functools.partial(plain, **kwargs))(start, *batch, 0)
  assert plain.ema is None and plain.evaluated["params"] is plain.params
  assert same(plain.params, states[0].params)


def test_loss_of_smoothed_labels_by_hand():
  start = start_of("LN")
  settings = mixing.Mixing(label_smoothing=0.3)
  _, metrics = train_once(mixing=settings)
  logits = model_of("LN").apply({"params": start.params}, pixels(BATCH))
  targets = np.full((12, 3), 0.1)
  targets[np.arange(12), LABELS[BATCH]] += 0.7
  want = -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()
  assert metrics["loss"] == pytest.approx(float(want), abs=1e-5)


def test_mixing_differs_between_seeds_and_steps():
  both = mixing.Mixing(mixup=1.0, cutmix=1.0)
  kwargs = dict(settings=CROPS, mixing=both)
  losses = {float(train_once(seed=n, **kwargs)[1]["loss"]) for n in (0, 1)}
  later = start_of("LN").replace(step=jnp.int32(1))
  losses.add(float(train_once(state=later, **kwargs)[1]["loss"]))
  losses.add(float(train_once(settings=CROPS)[1]["loss"]))
  assert len(losses) == 4


# Evaluation.


@functools.partial(jax.jit, static_argnames=("model", "image_size"))
def eval_step(*args, model, image_size):
  return train_step_lib.eval_step(*args, model=model, image_size=image_size)


def evaluate(indices, mask, norm="BN", params=None):
  start = start_of(norm)
  return eval_step(
    start.params if params is None else params,
    start.batch_stats,
    IMAGES[indices],
    LABELS[indices],
    np.asarray(mask),
    model=model_of(norm),
    image_size=SIZE,
  )


def test_evaluation_sums_over_unmasked_examples():
  indices, mask = np.arange(24), np.arange(24) % 2 == 0
  start = start_of("BN")
  logits = model_of("BN").apply(
    {"params": start.params, "batch_stats": start.batch_stats},
    pixels(indices),
    train=False,
  )
  losses = -jax.nn.log_softmax(logits)[indices, LABELS]
  correct = np.argmax(logits, axis=-1) == LABELS
  assert 0 < correct[mask].sum() < correct.sum() < 24
  got = evaluate(indices, mask)
  assert set(got) == {"loss", "correct", "logits", "labels"}
  np.testing.assert_allclose(got["logits"], logits, rtol=1e-5, atol=1e-6)
  assert got["loss"] == pytest.approx(float(losses[mask].sum()), rel=1e-5)
  assert got["correct"] == correct[mask].sum()
  assert got["loss"].dtype == jnp.float32
  assert jnp.issubdtype(got["correct"].dtype, jnp.integer)
  everything = evaluate(indices, np.ones(24, bool))
  assert everything["loss"] == pytest.approx(float(losses.sum()), rel=1e-5)
  assert everything["correct"] == correct.sum()


def test_masked_examples_have_no_effect():
  mask = np.arange(24) % 2 == 0
  other = np.where(mask, np.arange(24), 7)
  found, expected = evaluate(other, mask), evaluate(np.arange(24), mask)
  for key in ("loss", "correct"):
    assert found[key] == expected[key]
  nothing = evaluate(other, np.zeros(24, bool))
  assert nothing["loss"] == 0
  assert nothing["correct"] == 0


def test_evaluation_resizes_images():
  model = models.create(
    "ViT-B_16",
    num_classes=3,
    image_size=12,
    patch_size=4,
    hidden_size=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=1,
  )
  state = train_state.init_state(model, DESCENT, 12, seed=0)
  logits = model.apply(
    {"params": state.params}, preprocess.prepare(IMAGES[BATCH], 12)
  )
  want = -jax.nn.log_softmax(logits)[np.arange(12), LABELS[BATCH]].sum()
  got = eval_step(
    state.params,
    {},
    IMAGES[BATCH],
    LABELS[BATCH],
    np.ones(12, bool),
    model=model,
    image_size=12,
  )
  assert got["loss"] == pytest.approx(float(want), rel=1e-5)
