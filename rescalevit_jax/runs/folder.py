"""The folder of a run: its name, and the config of the run that it holds."""

import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.runs import checkpoint_folders

# RecursionError: of thousands of nested brackets.
_DAMAGE = (AttributeError, KeyError, RecursionError, TypeError, ValueError)


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns runs/DATASET-MODEL-NORM-scratch-seed0 or …-pretrained-seed0."""
  start = "scratch" if config.pretrained_path is None else "pretrained"
  return pathlib.Path("runs") / "-".join(
    [
      config.dataset.replace("/", "_"),
      config.model_name,
      config.model.norm,
      start,
      f"seed{config.seed}",
    ]
  )


def read_config(
  workdir: str | pathlib.Path,
) -> ml_collections.ConfigDict | None:
  """Reads the config of the run in a folder; None if there is no run."""
  path = pathlib.Path(workdir) / "config.json"
  try:
    return config_lib.from_json(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except _DAMAGE as e:
    raise errors.UserError(
      f"{path}: damaged, or of another program ({e}); use another folder"
    ) from e


def require_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
  """Does the same; raises UserError if there is no run."""
  config = read_config(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there (no config.json); give the folder of a run"
    )
  return config


def check_same_run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """Raises UserError if the folder holds a run of another config.

  A run that has saved nothing yet may change its config.
  """
  workdir = pathlib.Path(workdir)
  saved = checkpoint_folders.saved_steps(workdir, "last")
  if not saved and not (workdir / "result.json").exists():
    return
  old = read_config(workdir)
  if old is None:
    raise errors.UserError(
      f"{workdir}: holds a run without its config.json; choose another"
      " --workdir"
    )
  if keys := config_lib.differing_keys(old, config):
    raise errors.UserError(
      f"{workdir}: holds a run of another config: {', '.join(keys)}; choose"
      " another --workdir or the old values"
    )
