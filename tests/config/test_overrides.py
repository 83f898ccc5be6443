"""Config files and config overrides on the command line."""

import paths
import pytest

from rescalevit_jax import errors
from rescalevit_jax.config import overrides

QUICKSTART = str(paths.ROOT / "configs" / "quickstart.py")


@pytest.mark.parametrize(
  "argv, rest, settings",
  [
    (["--config=a.py", "--jobs", "2"], ["--config=a.py", "--jobs", "2"], []),
    (["--config.seed=5", "x"], ["x"], ["seed=5"]),
    (["--config.seed", "5", "x"], ["x"], ["seed=5"]),
    (["-config.seed=5"], [], ["seed=5"]),
    (["--config.weight_decay", "-1"], [], ["weight_decay=-1"]),
    (["--config.pretrained_path", "None"], [], ["pretrained_path=None"]),
    (["--config.pretrained_path=a=b"], [], ["pretrained_path=a=b"]),
    (["--config.deterministic", "x"], ["x"], ["deterministic=True"]),
    (["--", "--config.seed=5"], ["--", "--config.seed=5"], []),
    (["--config.deterministic=False"], [], ["deterministic=False"]),
  ],
)
def test_overrides_are_split_from_other_arguments(argv, rest, settings):
  found_rest, found = overrides.split_argv(argv)
  assert found_rest == rest
  assert [str(setting) for setting in found] == settings


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config.seed"], ["--config.seed", "no value", "KEY=VALUE"]),
    (["--config.seed", "--dry_run"], ["--config.seed", "no value"]),
    (["--config.sed=5"], ["sed", "seed"]),
    (["--config.sed", "5"], ["sed", "seed"]),
    (["--config.model", "3"], ["unknown key 'model'"]),
  ],
)
def test_invalid_overrides_are_one_line_errors(argv, words):
  with pytest.raises(errors.UserError) as error:
    overrides.split_argv(argv)
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message


def test_the_home_folder_is_expanded_in_config_files(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  file = tmp_path / "a.py"
  file.write_text(
    "from rescalevit_jax import config as lib\n"
    "def get_config():\n"
    "  config = lib.default()\n"
    "  config.pretrained_path = '~/a.npz'\n"
    "  return config\n"
  )
  config = overrides.load_config(str(file), [])
  assert config.pretrained_path == "/home/me/a.npz"


def test_the_last_override_of_a_key_wins():
  settings = [
    overrides.Setting("seed", "3"),
    overrides.Setting("data.image_size", "None"),
    overrides.Setting("seed", "4"),
    overrides.Setting("data.image_size", "16"),
    overrides.Setting("pretrained_path", "a.npz"),
    overrides.Setting("pretrained_path", "None"),
  ]
  config = overrides.load_config(QUICKSTART, settings)
  assert (config.seed, config.data.image_size) == (4, 16)
  assert config.pretrained_path is None


def test_a_type_error_names_file_and_key():
  with pytest.raises(errors.UserError, match=r"quickstart.py.*batch"):
    overrides.load_config(QUICKSTART, [overrides.Setting("batch", "many")])
