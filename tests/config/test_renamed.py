"""Old keys and values load from config.json but are errors as overrides."""

import json

from flax import traverse_util
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.config import overrides
from rescalevit_jax.config import renamed


def other_value(key):
  """Return a valid value that is not the default."""
  default = keys.KEYS[key].default
  return not default if isinstance(default, bool) else default + 0.5


SAME_FORM = {k: x for k, x in renamed.KEYS.items() if k not in renamed.CONVERT}


def one_line(error, *words):
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message


def test_new_names_are_valid():
  assert {*renamed.KEYS.values()} <= keys.KEYS.keys()
  assert not renamed.KEYS.keys() & keys.KEYS.keys()
  for key, values in renamed.VALUES.items():
    assert all(keys.KEYS[key].accepts(value) for value in values.values())
    assert not any(keys.KEYS[key].accepts(value) for value in values)


def test_config_json_with_old_names_loads():
  values = config_lib.flatten(config_lib.default())
  changed = {new: other_value(new) for new in SAME_FORM.values()}
  changed["data.num_val"] = 7
  for old, new in SAME_FORM.items():
    del values[new]
    values[old] = changed[new]
  text = json.dumps(traverse_util.unflatten_dict(values, sep="."))
  loaded = config_lib.from_json(text)
  assert config_lib.flatten(loaded) == (
    config_lib.flatten(config_lib.default()) | changed
  )
  config_lib.validate(loaded)


@pytest.mark.parametrize(
  "key, old, new",
  [(k, *pair) for k, pairs in renamed.VALUES.items() for pair in pairs.items()],
)
def test_config_json_with_old_values_loads(key, old, new):
  config = config_lib.default()
  config.update_from_flattened_dict({key: old})
  with pytest.raises(errors.UserError) as error:
    config_lib.validate(config)
  one_line(error, key, old, new)
  loaded = config_lib.from_json(config_lib.to_json(config))
  assert config_lib.flatten(loaded)[key] == new
  config_lib.validate(loaded)


@pytest.mark.parametrize("old", renamed.KEYS)
def test_an_old_key_on_a_command_line_is_an_error_with_the_new_name(old):
  with pytest.raises(errors.UserError) as error:
    overrides.parse_setting(f"{old}=1", "--set")
  one_line(error, old, renamed.KEYS[old])


@pytest.mark.parametrize("old", ["scalar_lr", "scalar_lr_mult"])
@pytest.mark.parametrize("factor, new", [(1.0, None), (0.02, "scalars:0.02")])
def test_scalar_lr_mult_becomes_an_lr_mult_table(old, factor, new):
  values = config_lib.default().to_dict()
  del values["lr_mult"]
  loaded = config_lib.from_json(json.dumps({**values, old: factor}))
  assert loaded.lr_mult == new
  config_lib.validate(loaded)
