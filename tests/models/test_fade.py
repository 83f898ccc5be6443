"""Fade: LayerNorm at the start, a linear map or DyT at the end."""

import dataclasses
import functools
import runpy

import flax
import jax
import jax.numpy as jnp
import numpy as np
import paths
import pytest
import trees

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import fade
from rescalevit_jax.models.norms import gradual
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.pretrained import fold
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import run_reader
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import evaluate_run
from rescalevit_jax.training import experiment
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import measurements
from rescalevit_jax.training import train
from rescalevit_jax.training import trainer

D = 6
X = np.random.default_rng(0).normal(0.5, 2.0, (3, 4, D)).astype(np.float32)
PARAMS = {
  "scale": np.linspace(0.5, 1.5, D).astype(np.float32),
  "bias": np.linspace(-0.3, 0.4, D).astype(np.float32),
}
LOG_SIGMA = np.log(np.array([0.5, 3.0], np.float32))
SLOTS = [
  *(
    f"Transformer/encoderblock_{block}/LayerNorm_{number}"
    for block in range(2)
    for number in (0, 2)
  ),
  "Transformer/encoder_norm",
]


def variables(share=0.0, count=0, log_sigma=LOG_SIGMA, alpha=0.0):
  return {
    "params": PARAMS,
    "batch_stats": {
      "log_sigma": log_sigma,
      "alpha": np.float32(alpha),
      "count": np.int32(count),
      "faded": np.int32(share * gradual.FULL),
    },
  }


def apply(share, x=X, alpha=0.0):
  return fade.Fade(D).apply(variables(share, alpha=alpha), x, False)


def sigma(x):
  return np.sqrt(x.var(-1) + 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_fade_equals_layer_norm_bitwise_at_the_start(alpha):
  weights = np.random.default_rng(1).normal(size=X.shape)

  def total(module, found, x):
    y = module.apply(found, x, False)
    return (weights * y).sum(), y

  both = [
    jax.value_and_grad(functools.partial(total, module), 1, has_aux=True)(
      found, X
    )
    for module, found in (
      (fade.Fade(D), variables(alpha=alpha)),
      (layer_norm.LayerNorm(D), {"params": PARAMS}),
    )
  ]
  for ours, theirs in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_sigma_is_a_geometric_mean_with_the_frozen_sigma(share):
  x = X.astype(np.float64)
  frozen = np.exp(LOG_SIGMA)[[0, 1, 1, 1]]
  between = sigma(x) ** (1 - share) * frozen**share
  y = (x - x.mean(-1, keepdims=True)) / between[..., None]
  want = PARAMS["scale"] * y + PARAMS["bias"]
  np.testing.assert_allclose(apply(share), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_fade_with_alpha_becomes_dyt(share):
  """The end is DyT of x - mean, with alpha divided by the scale."""
  x = X.astype(np.float64)
  frozen = np.exp(LOG_SIGMA)[[0, 1, 1, 1]]
  between = sigma(x) ** (1 - share) * frozen**share
  centered = x - x.mean(-1, keepdims=True)
  a = 0.7 * share
  y = np.tanh(a * centered / between[..., None]) / a
  want = PARAMS["scale"] * y + PARAMS["bias"]
  np.testing.assert_allclose(
    apply(share, alpha=0.7), want, rtol=1e-5, atol=1e-5
  )
  if share == 1:
    for tokens, scale in ((slice(1), 0.5), (slice(1, None), 3.0)):
      params = {
        "alpha": np.float32([0.7 / scale]),
        "scale": PARAMS["scale"] / np.float32(0.7),
        "bias": PARAMS["bias"],
      }
      dyt = norms.NORMS["DyT"](D).apply(
        {"params": params}, np.float32(centered[:, tokens]), False
      )
      np.testing.assert_allclose(
        apply(1.0, alpha=0.7)[:, tokens], dyt, rtol=1e-5, atol=1e-5
      )


def test_fade_ends_as_a_linear_map_for_each_kind_of_token():
  """The map is exactly homogeneous in each token."""
  start = apply(1.0, 0 * X)
  np.testing.assert_array_equal(start - PARAMS["bias"], 0)
  linear = apply(1.0) - start
  for factor in (2.0, 1024.0, 2.0**-30):  # The last is below epsilon.
    grown = X.copy()
    grown[0, 1] *= factor
    found = apply(1.0, grown) - start
    want = np.array(linear)
    want[0, 1] *= factor
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-7)
  # LayerNorm would remove the factor.
  assert np.abs(apply(0.0, 1024 * X) - apply(0.0)).max() < 1e-4
  other = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
  np.testing.assert_allclose(
    apply(1.0, X + other) - start,
    linear + apply(1.0, other) - start,
    rtol=1e-4,
    atol=1e-5,
  )
  jacobian = jax.jacobian(lambda x: apply(1.0, x[None])[0])
  np.testing.assert_array_equal(jacobian(X[0]), jacobian(100 * X[0]))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradient_equals_finite_differences(share, alpha):
  """Test the input and each parameter in a random direction."""
  rng = np.random.default_rng(1)
  weights = rng.normal(size=X.shape)
  statistics = variables(share, alpha=alpha)["batch_stats"]

  def fixed(params, x):
    return (
      weights
      * fade.Fade(D).apply(
        {"params": params, "batch_stats": statistics}, x, False
      )
    ).sum()

  at = (PARAMS, X)
  gradient = jax.grad(fixed, argnums=(0, 1))(*at)
  way = jax.tree.map(lambda x: rng.normal(size=x.shape), at)
  ends = [
    fixed(*jax.tree.map(lambda x, w, h=h: np.float32(x + h * w), at, way))
    for h in (1e-2, -1e-2)
  ]
  slope = sum(
    (g * w).sum()
    for g, w in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
  )
  np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-2, rtol=5e-3)


def passes(schedule, batches, start):
  found = start
  module = fade.Fade(D, schedule=schedule)
  for x in batches:
    _, new = module.apply(found, x, True, mutable=["batch_stats"])
    found = {"params": PARAMS, **new}
  return found["batch_stats"]


@pytest.mark.parametrize("separate_cls", [True, False])
def test_running_statistics_by_hand(separate_cls):
  """Test the mean of the first 100 passes, then a momentum of 0.99."""
  schedule = fade.Schedule(1000, 2000, 1.0, separate_cls)
  batches = [X, 3 * X - 1, X**2]
  found = passes(schedule, batches, variables())
  logs = [np.log(sigma(x.astype(np.float64))) for x in batches]
  kinds = [(log[:, 0].mean(), log[:, 1:].mean()) for log in logs]
  if not separate_cls:
    kinds = [(log.mean(), log.mean()) for log in logs]
  want = np.mean(kinds, axis=0)
  np.testing.assert_allclose(found["log_sigma"], want, rtol=1e-5)
  assert found["count"] == 3 and found["faded"] == 0
  later = passes(schedule, [X], variables(count=500))
  want = LOG_SIGMA + 0.01 * (kinds[0] - LOG_SIGMA)
  np.testing.assert_allclose(later["log_sigma"], want, rtol=1e-5)
  assert later["count"] == 501


def test_statistics_freeze_when_a_site_has_faded():
  schedule = fade.Schedule(1, 3, 1.0, True)
  half, full = variables(0.5, count=2), variables(1.0, count=3)
  moved = passes(schedule, [X], half)
  assert moved["faded"] == gradual.FULL
  assert (moved["log_sigma"] != LOG_SIGMA).all()
  stays = passes(schedule, [X, X + 1], full)
  np.testing.assert_array_equal(stays["log_sigma"], LOG_SIGMA)
  assert stays["faded"] == gradual.FULL
  # A later schedule does not undo it.
  stays = passes(fade.Schedule(90, 99, 1.0, True), [X], full)
  assert stays["faded"] == gradual.FULL


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_alpha_of_the_schedule_overrides_a_files_alpha(alpha):
  """A training pass stores the schedule's alpha for evaluation."""
  module = fade.Fade(D, schedule=fade.Schedule(1, 2, 1.0, True, alpha))
  found = variables(1.0, count=9, alpha=0.25)
  np.testing.assert_array_equal(
    module.apply(found, X, False), apply(1.0, alpha=alpha)
  )
  _, new = module.apply(found, X, True, mutable=["batch_stats"])
  assert new["batch_stats"]["alpha"] == alpha


def test_loading_a_file_keeps_faded_but_resets_count(tiny_config, tmp_path):
  """A new run restarts its schedule."""
  tiny_config.model.norm = "Fade"
  parts = experiment.create(tiny_config)
  state = parts.init_state()
  flat = flax.traverse_util.flatten_dict(state.batch_stats)
  numbers = {"count": 60, "faded": gradual.FULL // 4}
  flat = {k: x + numbers.get(k[-1], 0) for k, x in flat.items()}
  saved = flax.traverse_util.unflatten_dict(flat)
  npz.save(tmp_path / "a.npz", state.params, saved)
  tiny_config.pretrained_path = str(tmp_path / "a.npz")
  found = initial_state.create(experiment.create(tiny_config)).batch_stats
  assert {int(n) for n in stats(found, "count")} == {0}
  assert {int(n) for n in stats(found, "faded")} == {gradual.FULL // 4}


def test_saturation_of_the_tanh():
  images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3))
  params, _ = trees.fresh("LN")

  def measure(alpha, share, **kwargs):
    model = tiny(**kwargs)
    found = model.init(jax.random.key(0), images)["batch_stats"]
    flat = flax.traverse_util.flatten_dict(found)
    numbers = {"alpha": alpha, "faded": round(share * gradual.FULL)}
    flat = {k: x + numbers.get(k[-1], 0) for k, x in flat.items()}
    found = flax.traverse_util.unflatten_dict(flat)
    variables = {"params": params, "batch_stats": found}
    return measurements.forward(model, variables, images)

  for alpha, share, want in ((1e6, 1.0, 1), (1e6, 0.0, 0), (1e-6, 1.0, 0)):
    found = measure(alpha, share)
    for branch in ("attention", "mlp"):
      np.testing.assert_allclose(found[f"saturation_{branch}"], [want] * 2)
    np.testing.assert_allclose(found["head/saturation"], want)
  some = measure(1.0, 1.0)["saturation_mlp"]
  assert (0.01 < some).all() and (some < 0.99).all()
  linear = measure(0.0, 1.0, norm_schedule=fade.Schedule(0, 1, 1.0, True))
  assert not any("saturation" in name for name in linear)


def test_schedule_by_hand():
  """Three sites fade for 20 of the 40 passes after the hundredth."""
  schedule = fade.Schedule(100, 140, 0.5, True)
  ramps = [schedule.at_site(site, 3) for site in range(3)]
  assert [(r.begin, r.end) for r in ramps] == [
    (100, 120),
    (110, 130),
    (120, 140),
  ]
  found = [
    [float(ramp.faded(jnp.int32(n))) / gradual.FULL for ramp in ramps]
    for n in (0, 100, 105, 120, 125, 140, 10_000)
  ]
  assert found == [
    [0, 0, 0],
    [0, 0, 0],
    [0.25, 0, 0],
    [1, 0.5, 0],
    [1, 0.75, 0.25],
    [1, 1, 1],
    [1, 1, 1],
  ]
  together = fade.Schedule(100, 140, 1.0, True)
  assert {together.at_site(site, 3) for site in range(3)} == {together}
  for begin in (100, 99.6):  # A short schedule also ends after pass 100.
    short = fade.Schedule(begin, 100, 1.0, True)
    found = [int(short.faded(jnp.int32(n))) for n in (99, 100)]
    assert found == [0, gradual.FULL]


def tiny(norm="Fade", **kwargs):
  return models.create(
    "ViT-B_16",
    num_classes=3,
    norm=norm,
    image_size=8,
    dropout_rate=0.0,
    **trees.TINY,
    **kwargs,
  )


def stats(state_or_stats, name):
  found = flax.traverse_util.flatten_dict(state_or_stats, sep="/")
  keys = [f"{slot}/{name}" for slot in SLOTS]
  return [np.asarray(found[key]) for key in keys if key in found]


def test_first_blocks_fade_first_and_the_final_norm_last():
  model = tiny(norm_schedule=fade.Schedule(2, 10, 0.5, True))
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
  start = model.init(jax.random.key(0), x)

  @jax.jit
  def train_pass(found):
    _, new = model.apply(
      {**start, "batch_stats": found}, x, train=True, mutable=["batch_stats"]
    )
    return new["batch_stats"]

  moving, found = start["batch_stats"], []
  for passes_done in range(1, 11):
    moving = train_pass(moving)
    if passes_done % 2 == 0:
      shares = np.stack(stats(moving, "faded")) / gradual.FULL
      found.append(shares.tolist())
  assert found == [
    [0, 0, 0, 0, 0],
    [0.5, 0.25, 0, 0, 0],
    [1, 0.75, 0.5, 0.25, 0],
    [1, 1, 1, 0.75, 0.5],
    [1, 1, 1, 1, 1],
  ]
  assert {int(n) for n in stats(moving, "count")} == {10}


def test_a_model_in_transition_is_not_the_best(
  tiny_config, tmp_path, monkeypatch
):
  real = evaluate.Evaluator.__call__
  accuracies = iter([0.9, 0.8, 0.4, 0.5, 0.6])  # Last: training images.

  def falling(self, *args):
    return dataclasses.replace(real(self, *args), accuracy=next(accuracies))

  monkeypatch.setattr(evaluate.Evaluator, "__call__", falling)
  tiny_config.model.norm = "Fade"
  tiny_config.fade.end = 0.75
  tiny_config.eval_every = 3
  result = train.train_and_evaluate(tiny_config, tmp_path)
  assert (result["best_accuracy"], result["best_step"]) == (0.5, 12)
  assert checkpoint.load_variables(tmp_path, "best")[2] == 12
  lines = [x for x in run_reader.read_metrics(tmp_path) if "test/loss" in x]
  assert [x["step"] for x in lines] == [3, 6, 9, 12]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_run_resumes_in_the_middle_of_a_fade(
  alpha, tiny_config, tmp_path, monkeypatch, shared_programs
):
  """Test bitwise equality; the final evaluation has no norm."""
  config = tiny_config
  config.model.norm = "Fade"
  config.fade.update(
    {
      "begin": 0.25,
      "end": 0.75,
      "site_fraction": 0.5,
      "separate_cls": False,
      "alpha": alpha,
    }
  )
  config.ema_decay = 0.9
  config.accum_steps = 2
  config.model.remat = True
  train.train_and_evaluate(config, tmp_path / "a")
  real = trainer.Trainer._step

  def stopping(self, *batch):
    if self._progress.step == 7:
      raise InterruptedError
    real(self, *batch)

  with monkeypatch.context() as patch:
    patch.setattr(trainer.Trainer, "_step", stopping)
    with pytest.raises(InterruptedError):
      train.train_and_evaluate(config, tmp_path / "b")
  _, between, at = checkpoint.load_variables(tmp_path / "b", "latest")
  # Steps 3 to 9 of 12, two passes each; site 0 takes half of them.
  assert at == 4
  shares = [int(n) / gradual.FULL for n in stats(between, "faded")]
  assert shares == pytest.approx([1 / 3, 0, 0], abs=1e-4)
  train.train_and_evaluate(config, tmp_path / "b")
  ends = [checkpoint.load_variables(tmp_path / name, "latest") for name in "ab"]
  for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_array_equal(x, y)
  weights, end, _ = ends[0]
  assert {int(n) for n in stats(end, "faded")} == {gradual.FULL}
  np.testing.assert_allclose(stats(end, "alpha"), alpha)
  if alpha:
    with pytest.raises(
      errors.UserError, match=r"folds only after.*fade\.alpha"
    ):
      fold.fold("Fade", weights, end)
    # Evaluation uses the file's alpha.
    npz.save(tmp_path / "a.npz", weights, end)
    config.update({"eval_weights": "pretrained", "ema_decay": 0.0})
    config.update({"pretrained_path": str(tmp_path / "a.npz")})
    config.fade.alpha = 0.0
    found = evaluate_run.evaluate_run(config, tmp_path / "c")
    last = run_reader.read(tmp_path / "a").result["last_loss"]
    assert found["loss"] == pytest.approx(last, rel=1e-6)
  else:  # Averages stay equal for all tokens.
    fold.fold("Fade", weights, end)


def test_an_ln_file_loads_strictly_and_starts_as_ln(tmp_path):
  saved, _ = trees.fresh("LN", seed=2)
  npz.save(tmp_path / "a.npz", saved, {})
  zeros = jax.tree.map(np.zeros_like, trees.fresh("Fade", seed=1))
  params, statistics, report = load.load(tmp_path / "a.npz", *zeros)
  trees.same(trees.flat(params, {}), trees.flat(saved, {}))
  assert not report.dropped and not report.reinitialized
  names = ("log_sigma", "alpha", "count", "faded")
  assert {*report.initial} == {
    f"batch_stats/{slot}/{name}" for slot in SLOTS for name in names
  }
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
  found = tiny().apply({"params": params, "batch_stats": statistics}, x)
  want = tiny(norm="LN").apply({"params": saved}, x)
  np.testing.assert_array_equal(found, want)


def test_fade_with_one_scale_folds_into_the_next_layers(tmp_path):
  params, statistics = jax.tree.map(
    lambda x: x if x.dtype == np.int32 else 0.5 * x, trees.fresh("Fade", seed=9)
  )
  found = flax.traverse_util.flatten_dict(statistics, sep="/")
  for slot in SLOTS:
    found[f"{slot}/log_sigma"][0] = found[f"{slot}/log_sigma"][1]
    found[f"{slot}/alpha"] = np.float32(0)
    found[f"{slot}/faded"] = np.int32(gradual.FULL)

  def folded():
    tree = flax.traverse_util.unflatten_dict(found, sep="/")
    return tree, fold.fold("Fade", params, tree)

  tree, weights = folded()
  npz.save(tmp_path / "a.npz", *weights)
  model = npz_model.load(tmp_path / "a.npz")
  assert model.model.config.norm == "Identity"
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
  want = tiny().apply({"params": params, "batch_stats": tree}, x)
  error = np.abs(model.model.apply(model.variables, x) - want).max()
  assert error < 1e-4 * np.abs(want).max()
  assert error < 0.03 * np.ptp(want, axis=0).min()

  found[f"{SLOTS[1]}/log_sigma"] = LOG_SIGMA
  with pytest.raises(
    errors.UserError, match=r"LayerNorm_2.*fade\.separate_cls"
  ):
    folded()
  found[f"{SLOTS[1]}/log_sigma"] = LOG_SIGMA[[0, 0]]
  found[f"{SLOTS[4]}/faded"] = np.int32(gradual.FULL - 1)
  with pytest.raises(errors.UserError, match=r"encoder_norm.*after it has"):
    folded()


def test_fade_without_a_schedule_stays_layer_norm():
  model = tiny()
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
  start = model.init(jax.random.key(0), x, train=True)  # Not a training pass.
  _, new = model.apply(start, x, train=True, mutable=["batch_stats"])
  assert {int(n) for n in stats(new["batch_stats"], "faded")} == {0}
  assert {int(n) for n in stats(new["batch_stats"], "count")} == {1}


@pytest.mark.parametrize(
  "run, norm, model_name",
  [
    ("LN", "LN", "ViT-XS_4"),
    ("Fade", "Fade", "ViT-XS_4"),
    ("Fade-one,ViT-L_32", "Fade", "ViT-L_32"),
    ("Fade-DyT", "Fade", "ViT-XS_4"),
  ],
)
def test_config_of_the_experiment(run, norm, model_name):
  """The methods of the experiment differ only in the norm."""
  path = paths.ROOT / "configs" / "remove_norm.py"
  get_config = runpy.run_path(str(path))["get_config"]
  config = get_config(run)
  config_lib.validate(config)
  assert (config.model.norm, config.model_name) == (norm, model_name)
  assert config.fade.separate_cls == ("one" not in run)
  assert config.fade.alpha == (0.5 if "DyT" in run else 0)
  control = get_config(run.replace(run.split(",")[0], "LN"))
  keys = {
    line.split()[0] for line in config_lib.differing_keys(control, config)
  }
  assert keys <= {"model.norm", "fade.separate_cls", "fade.alpha"}
  with pytest.raises(errors.UserError, match="did you mean Fade"):
    get_config("fade")
