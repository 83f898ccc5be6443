"""Calibration of norms on the first batches."""

import jax
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax.augment import mixing
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import dataset
from rescalevit_jax.models.norms import traits
from rescalevit_jax.pretrained import npz
from rescalevit_jax.training import experiment
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import train_step

PLACE = ("Transformer", "encoderblock_0", "Cal_0")


def calibrated_state(config):
  return initial_state.create(experiment.create(config))


def at(tree, *path):
  for name in path:
    tree = tree[name]
  return np.asarray(tree)


def different(a, b):
  """Return the paths of leaves that differ between two trees."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, x), y in pairs
    if not np.array_equal(x, y)
  }


def test_calibration_sets_only_alpha_and_means(tiny_config):
  tiny_config.model.norm = "Cal"
  state = calibrated_state(tiny_config)
  scratch = experiment.create(tiny_config).init_state()
  changed = different(
    (state.params, state.batch_stats, state.opt_state),
    (scratch.params, scratch.batch_stats, scratch.opt_state),
  )
  assert {key.rpartition("/")[2] for key in changed} == {"alpha", "init_mean"}
  assert len(changed) == 2 * (2 * 1 + 1)
  assert state.step == 0


@pytest.mark.parametrize("accum_steps, mixup", [(1, 0.0), (3, 0.0), (3, 0.8)])
def test_calibration_uses_the_first_eight_training_batches(
  tiny_config, accum_steps, mixup
):
  tiny_config.model.norm = "Cal"
  tiny_config.model.dropout_rate = 0.0
  tiny_config.accum_steps = accum_steps
  tiny_config.augment.flip = True
  tiny_config.mixup = mixup
  parts = experiment.create(tiny_config)
  state = initial_state.create(parts)

  @jax.jit
  def embed(x):
    """Return the input of the first norm, which needs no calibration."""
    _, found = parts.model.apply(
      {"params": state.params, "batch_stats": state.batch_stats},
      x,
      capture_intermediates=lambda module, _: module.name == "posembed_input",
    )
    found = found["intermediates"]["Transformer"]["posembed_input"]["__call__"]
    return found[0]

  split, seen = parts.dataset.train, []
  for number in range(1, 9):
    places = dataset.batch_indices(tiny_config.seed, number, 48, len(split))
    shape = (accum_steps, 48 // accum_steps)
    crop_keys, _, mixing_keys = train_step.random_keys(0, number, shape)
    x = preprocess.prepare_random(
      crop_keys.reshape(-1),
      split.images[places],
      8,
      preprocess.Augment(**tiny_config.augment),
    )
    if mixup:
      how = mixing.Mixing(0.0, mixup, 0.0)
      x = np.concatenate(
        [
          mixing.mix(keys, images, np.zeros(len(keys), int), 10, how)[0]
          for keys, images in zip(
            mixing_keys, x.reshape(*shape, 8, 8, 3), strict=True
          )
        ]
      )
    seen.append(np.asarray(embed(x)))
  mean = np.mean(seen, axis=(0, 1, 2))
  np.testing.assert_allclose(
    at(state.batch_stats, *PLACE, "init_mean"), mean, rtol=1e-4, atol=1e-6
  )
  alpha = 1 / np.std(np.asarray(seen) - mean)
  found = at(state.params, *PLACE, "alpha")
  np.testing.assert_allclose(found, [alpha], rtol=2e-3)


@pytest.mark.parametrize(
  "norm, calibration, calibrated",
  [
    ("Cal", "auto", True),
    ("Cal", "none", False),
    ("DyT", "auto", False),
    ("DyT", "all", True),
    ("Derf", "all", True),
    ("LN", "all", False),
  ],
)
def test_calibration_key_selects_norms(
  tiny_config, norm, calibration, calibrated
):
  tiny_config.model.norm = norm
  tiny_config.calibration = calibration
  state = calibrated_state(tiny_config)
  scratch = experiment.create(tiny_config).init_state()
  assert bool(different(state.params, scratch.params)) == calibrated


def test_alpha_init_selects_the_calibrated_sites(tiny_config):
  tiny_config.model.norm = "DyISRU"
  tiny_config.model.alpha_init = "calibrated,0.5,calibrated"
  state = calibrated_state(tiny_config)
  scratch = experiment.create(tiny_config).init_state()
  found = different(state.params, scratch.params)
  assert len(found) == 2 and all("DyISRU_2" not in str(x) for x in found)
  tiny_config.calibration = "all"
  with pytest.raises(errors.UserError, match="overrides calibration"):
    experiment.create(tiny_config)
  tiny_config.calibration = "none"
  with pytest.raises(errors.UserError, match="needs a calibration"):
    experiment.create(tiny_config)


def test_calibration_keeps_values_of_a_loaded_file(tiny_config, tmp_path):
  tiny_config.model.norm = "Cal"
  brought = calibrated_state(tiny_config)
  npz.save(tmp_path / "a.npz", brought.params, brought.batch_stats)
  tiny_config.seed = 1
  tiny_config.pretrained_path = str(tmp_path / "a.npz")
  state = calibrated_state(tiny_config)
  assert not different(state.params, brought.params)
  assert not different(state.batch_stats, brought.batch_stats)

  tiny_config.model.norm = "LN"
  tiny_config.pretrained_path = None
  plain = calibrated_state(tiny_config)
  npz.save(tmp_path / "b.npz", plain.params, plain.batch_stats)
  tiny_config.model.norm = "Cal"
  tiny_config.pretrained_path = str(tmp_path / "b.npz")
  state = calibrated_state(tiny_config)
  assert at(state.params, *PLACE, "alpha") != 1
  kernel = ("embedding", "kernel")
  np.testing.assert_array_equal(
    at(state.params, *kernel), at(plain.params, *kernel)
  )


def test_averages_start_from_the_loaded_and_calibrated_weights(
  tiny_config, tmp_path
):
  tiny_config.ema_decay = 0.9
  tiny_config.model.norm = "Cal"
  state = calibrated_state(tiny_config)
  assert not different(state.evaluated["params"], state.params)
  npz.save(tmp_path / "a.npz", state.params, state.batch_stats)
  tiny_config.seed = 1
  tiny_config.pretrained_path = str(tmp_path / "a.npz")
  loaded = calibrated_state(tiny_config)
  assert not different(loaded.evaluated["params"], state.params)
  assert not different(loaded.evaluated["batch_stats"], state.batch_stats)


def test_calibrating_a_new_site_keeps_loaded_sites(tiny_config, tmp_path):
  tiny_config.model.norm = "Cal"
  brought = calibrated_state(tiny_config)
  npz.save(tmp_path / "a.npz", brought.params, brought.batch_stats)
  tiny_config.model.embedding_norm = True
  tiny_config.pretrained_path = str(tmp_path / "a.npz")
  state = calibrated_state(tiny_config)
  np.testing.assert_array_equal(
    at(state.params, *PLACE, "alpha"), at(brought.params, *PLACE, "alpha")
  )


def test_remat_does_not_change_calibration(tiny_config):
  tiny_config.model.norm = "Cal"
  tiny_config.model.sigma_reparam = True
  state = calibrated_state(tiny_config)
  tiny_config.model.remat = True
  again = calibrated_state(tiny_config)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_init_creates_no_calibration_collection(tiny_config):
  tiny_config.model.norm = "Cal"
  model = experiment.create_model(tiny_config, 10)
  found = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
  assert traits.CALIBRATION not in found
