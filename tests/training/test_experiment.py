"""Config keys take effect in the experiment."""

import flax
import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax.augment import mixing
from rescalevit_jax.augment import preprocess
from rescalevit_jax.optim import lr_schedule
from rescalevit_jax.optim import optimizers
from rescalevit_jax.runtime import accelerator
from rescalevit_jax.training import experiment
from rescalevit_jax.training import initial_state

OPTIMIZER = {
  "momentum": 0.8,
  "adam_b2": 0.7,
  "weight_decay": 0.3,
  "grad_norm_clip": 0.5,
  "agc": 0.02,
  "lr_mult": "scalars:0.25",
  "wd_mult": "head/*:2",
  "layer_decay": 0.9,
}
OTHERS = {
  "momentum": 0.5,
  "adam_b2": 0.99,
  "weight_decay": 0.1,
  "grad_norm_clip": 0.1,
  "agc": 0.0,
  "lr_mult": None,
  "wd_mult": None,
  "layer_decay": 1.0,
}


def two_updates(made, params):
  """Apply two random gradients; return the second update as a vector."""
  rng = np.random.default_rng(0)
  state = made.init(params)
  for _ in range(2):
    grads = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )
    updates, state = made.update(grads, state, params)
  return flatten_util.ravel_pytree(updates)[0]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizer_keys_take_effect(name, tiny_config):
  tiny_config.update({"optimizer": name, "decay_type": "linear"})
  tiny_config.update({"base_lr": 0.3, **OPTIMIZER})
  tiny_config.update({"decay_steps": 4, "min_lr": 0.01})
  tiny_config.model.norm = "DyT"
  found = experiment.create(tiny_config)
  shapes = found.abstract_state().params
  block = shapes["Transformer"]["encoderblock_0"]
  # One parameter of each kind: matrix, vector and scalar.
  block = {name: block[name] for name in ("DyT_0", "MlpBlock_3")}
  block["MlpBlock_3"] = {"Dense_0": block["MlpBlock_3"]["Dense_0"]}
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    {"Transformer": {"encoderblock_0": block}, "head": shapes["head"]},
  )
  rate = lr_schedule.create(0.3, 3, 12, "linear", 4, 0.01)
  assert [found.lr_schedule(n) for n in range(12)] == [
    rate(n) for n in range(12)
  ]
  got = two_updates(found.optimizer, params)
  want = two_updates(optimizers.create(name, rate, **OPTIMIZER), params)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # Changing any of the keys changes the updates.
  for key, other in OTHERS.items():
    changed = {**OPTIMIZER, key: other}
    different = two_updates(optimizers.create(name, rate, **changed), params)
    same = np.allclose(got, different, rtol=1e-3, atol=0)
    # Adam's and Muon's updates hardly depend on the gradient's scale.
    scale = key in ("grad_norm_clip", "agc") and name != "sgd"
    assert scale or same == ((name, key) == ("sgd", "adam_b2")), key


def test_augmentation_keys_take_effect(tiny_config):
  keys = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 0.7}
  tiny_config.update(keys)
  tiny_config.augment.update({"crop": False, "pad_crop": 2, "auto": "trivial"})
  tiny_config.augment.update({"random_erasing": 0.3, "flip": True})
  tiny_config.augment.update({"rand_ops": 3, "rand_magnitude": 5.0})
  tiny_config.augment.color_jitter = 0.4
  found = experiment.create(tiny_config).gradient_options()
  assert found["mixing"] == mixing.Mixing(0.1, 0.8, 0.7)
  assert found["augment"] == preprocess.Augment(
    crop=False,
    pad_crop=2,
    auto="trivial",
    rand_ops=3,
    rand_magnitude=5.0,
    color_jitter=0.4,
    random_erasing=0.3,
    flip=True,
  )


def test_ema_keys_take_effect(tiny_config):
  tiny_config.ema_decay = 0.75
  found = experiment.create(tiny_config)
  state, step, params = found.init_state(), found.train_step(1), []
  with found.train_loader.batches(found.train_indices, range(1, 3)) as batches:
    for images, labels in batches:
      state, _ = step(state, images, labels, np.uint32(0))
      params.append(jax.device_get(state.params))
  average = state.ema["params"]
  want = jax.tree.map(lambda a, b: (0.75 * a + b) / 1.75, *params)
  flat = flax.traverse_util.flatten_dict(want, sep="/")
  for key, got in flax.traverse_util.flatten_dict(average, sep="/").items():
    np.testing.assert_allclose(got, flat[key], rtol=1e-4, atol=1e-6)
  assert not np.allclose(average["cls"], params[-1]["cls"], rtol=1e-3, atol=0)


def test_a_shift_beyond_the_image_is_refused(tiny_config):
  tiny_config.augment.update({"crop": False, "pad_crop": 7})
  initial_state.create(experiment.create(tiny_config))
  tiny_config.augment.pad_crop = 8
  found = experiment.create(tiny_config)
  with pytest.raises(errors.UserError, match="pad_crop is 8.*are 8 pixels"):
    initial_state.create(found)


@pytest.mark.parametrize(
  "capability, keys, line",
  [
    ((8, 6), {}, "attention by cudnn: fused"),
    ((7, 5), {}, "attention by xla: cuDNN needs compute capability 8.0"),
    ((9, 0), {"deterministic": True}, "attention by xla: deterministic=True"),
    ((9, 0), {"model.attention": "xla"}, "attention by xla: model.attention"),
  ],
)
def test_attention_choice_and_reason_are_logged(
  tiny_config, caplog, capability, keys, line
):
  tiny_config.update_from_flattened_dict({"dtype": "bfloat16", **keys})
  tiny_config.model.update({"hidden_size": 32, "num_heads": 2})
  caplog.set_level("INFO")
  gpu = accelerator.Accelerator("gpu", capability)
  with accelerator.compiling_for(gpu):
    experiment.create(tiny_config)
  assert line in caplog.text
