"""Planning runs from flags."""

import pathlib
import shlex
import subprocess
import sys

import paths
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import overrides
from rescalevit_jax.runs import folder
from rescalevit_jax.sweep import command_line
from rescalevit_jax.sweep import grid

QUICKSTART = str(paths.ROOT / "configs" / "quickstart.py")
ORIGINAL = str(paths.ROOT / "configs" / "original.py")


def plan(*axes, configs=(QUICKSTART,), settings=(), runs_dir="runs"):
  return grid.plan(
    configs,
    [overrides.parse_axis(axis) for axis in axes],
    [overrides.parse_setting(s, "--config") for s in settings],
    pathlib.Path(runs_dir),
  )


def names(runs):
  return [run.workdir.name for run in runs]


def test_grid_combines_all_values_and_configs():
  runs = plan(
    "model.norm=LN,Rescale",
    "seed=0,1,2",
    configs=(QUICKSTART, f"{ORIGINAL}:ViT-B_32,BN"),
    settings=("base_lr=0.25", "tfds_data_dir=None"),
  )
  assert len(runs) == 12
  assert [(r.config.model.norm, r.config.seed) for r in runs[:6]] == [
    (norm, seed) for norm in ("LN", "Rescale") for seed in (0, 1, 2)
  ]
  assert {r.config.model_name for r in runs[6:]} == {"ViT-B_32"}
  assert {r.config.base_lr for r in runs} == {0.25}
  assert runs[0].reference == QUICKSTART
  # main uses the same name.
  for run in runs:
    assert run.workdir == folder.default_workdir(run.config)


def test_a_config_without_a_grid_is_one_run():
  (run,) = plan(runs_dir="elsewhere")
  assert run.workdir == pathlib.Path(
    "elsewhere/digits-ViT-XS_2-Rescale-scratch-seed0"
  )


def test_names_contain_every_key_of_the_grid():
  start = "digits-ViT-XS_2-Rescale-scratch-seed"
  assert names(plan("base_lr=0.1,1", "seed=3")) == [
    f"{start}3-base_lr=0.1",
    f"{start}3-base_lr=1.0",
  ]
  assert names(plan("augment.flip=True,False", "tfds_data_dir=/a/b,None")) == [
    f"{start}0-augment.flip=True-tfds_data_dir=_a_b",
    f"{start}0-augment.flip=True-tfds_data_dir=None",
    f"{start}0-augment.flip=False-tfds_data_dir=_a_b",
    f"{start}0-augment.flip=False-tfds_data_dir=None",
  ]


def test_names_contain_the_initial_weights():
  start = "digits-ViT-XS_2-Rescale-"
  assert names(plan("pretrained_path=None,a/b.npz")) == [
    f"{start}scratch-seed0",
    f"{start}pretrained-seed0",
  ]
  assert names(plan("pretrained_path=a/b.npz,c.npz")) == [
    f"{start}pretrained-seed0-pretrained_path=a_b.npz",
    f"{start}pretrained-seed0-pretrained_path=c.npz",
  ]


def test_values_have_the_type_of_their_key():
  (run,) = plan(
    settings=(
      "batch=8",
      "base_lr=1",
      "augment.crop=false",
      "pretrained_path=7",
      "model.patch_size=2",
      "model.representation_size=None",
    )
  )
  values = config_lib.flatten(run.config)
  assert values["batch"] == 8
  assert values["base_lr"] == 1.0 and isinstance(values["base_lr"], float)
  assert values["augment.crop"] is False
  assert values["pretrained_path"] == "7"
  assert values["model.patch_size"] == 2
  assert values["model.representation_size"] is None


def test_command_of_a_run_gives_its_config():
  """main parses the planned command to the config of the run."""
  settings = ("augment.flip=True", "pretrained_path=None", "base_lr=1")
  (run,) = plan("model.norm=BN", settings=settings, runs_dir="a folder")
  assert run.command[:3] == [sys.executable, "-m", "rescalevit_jax.main"]
  assert f"--workdir={run.workdir}" in run.command
  code = (
    "import sys; from rescalevit_jax import config, main;"
    "print(config.to_json(main.parse(['main', *sys.argv[1:]])))"
  )
  command = [sys.executable, "-c", code, *run.command[3:]]
  done = subprocess.run(
    shlex.join(command),
    shell=True,
    capture_output=True,
    text=True,
    cwd=paths.ROOT,
  )
  assert done.stdout.strip() == config_lib.to_json(run.config).strip(), done


@pytest.mark.parametrize(
  "axes, settings, words",
  [
    (["model.nrom=LN"], [], ["model.nrom", "model.norm"]),
    (["model.norm=LN,Recsale"], [], ["Recsale", "Rescale"]),
    (["seed=0,x"], [], ["seed", "'x'"]),
    (["seed=0,-1"], [], ["seed is -1"]),
    (["seed=0,None"], [], ["seed is None"]),
    (["seed=0,1,0"], [], ["seed=0,1,0", "0 twice"]),
    (["base_lr=0.1,0.10"], [], ["the same run", "0.10"]),
    (["seed="], [], ["empty"]),
    (["seed=0,,1"], [], ["empty"]),
    (["seed"], [], ["KEY=VALUE"]),
    (["seed=0", "seed=1"], [], ["seed is given twice"]),
    (["seed=0,1"], ["seed=2"], ["seed is given twice"]),
    ([], ["batch=2", "batch=3"], ["batch is given twice"]),
    ([], ["btach=2"], ["btach", "batch"]),
    ([], ["batch"], ["KEY=VALUE"]),
    ([], ["batch=many"], ["batch", "many"]),
    ([], ["warmup_steps=3000"], ["warmup_steps"]),
  ],
)
def test_invalid_keys_and_values_are_errors(axes, settings, words):
  with pytest.raises(errors.UserError) as e:
    plan(*axes, settings=settings)
  for word in words:
    assert word in str(e.value), e.value


def test_a_name_too_long_for_a_folder_is_an_error():
  with pytest.raises(errors.UserError, match="longer than 255 bytes; shorten"):
    plan(f"lr_mult={'*/encoderblock_0/*:0.1 ' * 12}")


def test_two_runs_in_one_folder_are_an_error(tmp_path):
  other = tmp_path / "other.py"
  text = pathlib.Path(QUICKSTART).read_text(encoding="utf-8")
  other.write_text(text.replace("base_lr = 0.3", "base_lr = 0.2"))
  with pytest.raises(errors.UserError) as e:
    plan("seed=0,1", configs=(QUICKSTART, str(other)))
  for word in (
    f"--config={QUICKSTART} seed=0",
    f"--config={other} seed=0",
    "runs/digits-ViT-XS_2-Rescale-scratch-seed0",
    "base_lr (0.3 and 0.2)",
    "--grid",
    "--runs_dir",
  ):
    assert word in str(e.value)


def test_two_values_with_one_name_are_an_error(tmp_path):
  for name in ("a/b.npz", "a_b.npz"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  values = f"{tmp_path}/a/b.npz,{tmp_path}/a_b.npz"
  with pytest.raises(errors.UserError, match="pretrained_path .*; use another"):
    plan(f"pretrained_path={values}")
  values = values.replace(str(tmp_path), f"folder:{tmp_path}")
  with pytest.raises(errors.UserError, match="dataset .*; use another"):
    plan(f"dataset={values.replace('.npz', '')}")


@pytest.mark.parametrize(
  "text, words",
  [
    (None, ["No such file"]),
    ("def get_config(:\n", ["SyntaxError"]),
    ("def get_config():\n  return 1 / 0\n", ["ZeroDivisionError", ":2"]),
    ("def get_config(x):\n  return int(x)\n", ["get_config"]),
    ("x = 1\n", ["get_config"]),
    ("def get_config():\n  return None\n", ["None"]),
  ],
)
def test_an_invalid_config_file_is_an_error(text, words, tmp_path, capsys):
  path = tmp_path / "config.py"
  if text is not None:
    path.write_text(text)
  assert command_line.main([f"--config={path}"]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1
  for word in (str(path), *words):
    assert word in err


@pytest.mark.parametrize(
  "reference, words",
  [
    ("ViT-B_16", ["MODEL,NORM"]),
    ("ViT-B16,LN", ["ViT-B_16"]),
    ("ViT-B_16,ln", ["LN"]),
  ],
)
def test_invalid_arguments_of_original_config_are_errors(reference, words):
  with pytest.raises(errors.UserError) as e:
    plan(configs=(f"{ORIGINAL}:{reference}",))
  for word in words:
    assert word in str(e.value)


def test_flops_of_models_with_cudnn_are_known():
  cudnn, plain = (
    plan(settings=(f"model.attention={x}", "dtype=bfloat16"))[0]
    for x in ("cudnn", "xla")
  )
  assert cudnn.step_flops == plain.step_flops > 0
