"""Paths in the folder of a run, and its config."""

from collections.abc import Sequence
import json
import os
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors

CONFIG = "config.json"
CLASS_NAMES = "class_names.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
EVALUATION = "eval.json"
EVALUATIONS = "evaluations"  # Of other images than the run's own.
CONFUSION = "confusion.csv"
PROBE = "probe.json"  # Of --mode=probe.
PREDICTIONS = "predictions.npz"
LOG = "log.txt"  # Of runs that a sweep started.
PROFILE = "profile"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Return runs/DATASET-MODEL-NORM-scratch-seed0 or …-pretrained-seed0."""
  start = "scratch" if config.pretrained_path is None else "pretrained"
  dataset = config.dataset.replace("/", "_")
  model = f"{config.model_name}-{config.model.norm}"
  return pathlib.Path("runs", f"{dataset}-{model}-{start}-seed{config.seed}")


def evaluation(
  workdir: str | pathlib.Path, config: ml_collections.ConfigDict
) -> pathlib.Path:
  """Return the folder for the results of an evaluation.

  It is the run's folder, or a folder in evaluations/ if `eval_dataset` or
  `eval_split` selects other images than the run's own.
  """
  workdir = pathlib.Path(workdir)
  if config.eval_dataset is None and config.eval_split is None:
    return workdir
  name = config.eval_dataset or config.dataset
  for character in "%/*-":  # "_" may be part of another dataset's name.
    name = name.replace(character, f"%{ord(character):X}")
  if config.eval_split is not None:
    name += f"-{config.eval_split}"
  if len(os.fsencode(name)) > 255:
    key = "dataset" if config.eval_dataset is None else "eval_dataset"
    advice = "use a link with a shorter path"
    if len(config.eval_split or "") > len(config[key]):
      key, advice = "eval_split", "shorten it"
    raise errors.UserError(
      f"config: {key} ({config[key]}) is too long to name a folder; {advice}"
    )
  return workdir / EVALUATIONS / name


def checkpoints(workdir: str | pathlib.Path, kind: str) -> pathlib.Path:
  """Return the folder of a run's 'last', 'best', 'damaged' checkpoints.

  'deleted' is the folder of one that is being deleted.
  """
  return pathlib.Path(workdir) / CHECKPOINTS / kind


def saved_steps(workdir: str | pathlib.Path, kind: str) -> list[int]:
  """Return the steps of a run's 'last' or 'best' checkpoints, in order."""
  names = [path.name for path in checkpoints(workdir, kind).glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


def read_config(
  workdir: str | pathlib.Path,
) -> ml_collections.ConfigDict | None:
  """Return the config of the run in a folder, None if there is no run."""
  path = pathlib.Path(workdir) / CONFIG
  try:
    return config_lib.from_json(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except errors.DAMAGED_JSON as e:
    raise errors.UserError(
      f"{path}: damaged or from another program ({e}); use another folder"
    ) from e


def read_class_names(workdir: str | pathlib.Path) -> list[str] | None:
  """Return the names in class_names.json, None without the file."""
  path = pathlib.Path(workdir) / CLASS_NAMES
  try:
    names = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except errors.DAMAGED_JSON as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e
  if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
    raise errors.UserError(f"{path}: is not a list of names; delete it")
  return names


def check_class_names(
  workdir: str | pathlib.Path, class_names: Sequence[str]
) -> None:
  """Raise UserError if the classes of a run's dataset have changed.

  A run without class_names.json passes.
  """
  saved = read_class_names(workdir)
  if saved not in (None, list(class_names)):
    differing = sorted({*saved} ^ {*class_names}) or ["their order"]
    path = pathlib.Path(workdir) / CLASS_NAMES
    raise errors.UserError(
      f"{path}: the run has {len(saved)} classes, its dataset has"
      f" {len(class_names)} now; they differ in {', '.join(differing[:3])};"
      " restore the dataset, or start a run in another --workdir"
    )


def require_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
  """Return the valid config of the run in a folder."""
  config = read_config(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir}: no run there (no {CONFIG}); give the folder of a run"
    )
  try:
    config_lib.validate(config)
  except errors.UserError as e:
    raise errors.UserError(
      f"{pathlib.Path(workdir) / CONFIG}: damaged or written by another version"
      f" ({e}); use that version or another --workdir"
    ) from e
  return config
