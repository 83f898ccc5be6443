"""All files of configs/ are valid."""

import importlib.util

import jax
import jax.numpy as jnp
import paths
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.training import experiment

FOLDER = paths.ROOT / "configs"


def load(name):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  "name", sorted(path.stem for path in FOLDER.glob("*.py"))
)
def test_config_file_is_valid(name):
  config = load(name).get_config()
  config_lib.validate(config)
  experiment.create_model(config, 10)


def test_methods_of_the_study_differ():
  module = load("norm_free")
  configs = [module.get_config(method) for method in module.METHODS]
  for config in configs:
    model = experiment.create_model(config, 10).config
    assert (model.num_layers, model.hidden_size) == (12, 64)
    assert configs.count(config) == 1
  with pytest.raises(errors.UserError, match="'Cal-rescal'.*Cal-rescalenet"):
    module.get_config("Cal-rescal")


def test_strong_recipe_has_no_norm_and_moderate_size():
  config = load("cifar_strong").get_config()
  model = experiment.create_model(config, 10)
  images = jnp.zeros((1, config.image_size, config.image_size, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  size = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert 5e6 <= size <= 22e6
  assert config.model.norm == "Cal" and not config.model.qk_norm
