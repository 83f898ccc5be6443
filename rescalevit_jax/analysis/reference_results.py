"""Published results of RescaleViT, for comparison.

The figures are from the logs published with RescaleViT
(github.com/ChaofanTao/RescaleViT, folder output): one run each, fp16, one RTX
3090. Runs whose log ends before the 200th evaluation are omitted.
"""

from collections.abc import Mapping
import csv
import dataclasses
import math
import os
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import keys

# Data set, model_name, norm, True for pretrained weights.
Key = tuple[str, str, str, bool]


@dataclasses.dataclass(frozen=True)
class Figures:
  """The results of a published run.

  Attributes:
    best_accuracy: highest test accuracy of 200 evaluations, as a fraction.
    last_accuracy: test accuracy after the last step, as a fraction.
    minutes: duration on one RTX 3090.
  """

  best_accuracy: float
  last_accuracy: float
  minutes: float


@dataclasses.dataclass(frozen=True)
class Curve:
  """Test loss and accuracy of a published run over its steps.

  Attributes:
    steps: steps in ascending order.
    loss: mean cross-entropy at each step, in nats.
    accuracy: accuracy at each step, as a fraction.
  """

  steps: tuple[int, ...]
  loss: tuple[float, ...]
  accuracy: tuple[float, ...]


# Data set, model, norm, pretrained, best and last accuracy in %, minutes.
_TABLE = """
cifar10  ViT-B_32 LN      no  67.56 67.47  68.5
cifar10  ViT-B_32 LN      yes 98.48 98.44  67.7
cifar10  ViT-B_32 BN      no  67.11 66.91  68.6
cifar10  ViT-B_32 GN      no  65.50 65.38  73.0
cifar10  ViT-B_32 Rescale no  66.09 65.95  66.7
cifar10  ViT-L_16 LN      yes 98.99 98.99 308.2
cifar10  ViT-L_32 LN      no  67.56 67.40 146.2
cifar10  ViT-L_32 LN      yes 98.91 98.89 144.3
cifar10  ViT-L_32 BN      no  67.45 67.33 152.5
cifar10  ViT-L_32 GN      no  65.58 65.45 163.3
cifar10  ViT-L_32 Rescale no  65.41 65.16 145.8
cifar100 ViT-B_16 LN      no  43.46 43.31 168.8
cifar100 ViT-B_16 LN      yes 91.92 91.84 167.7
cifar100 ViT-B_16 BN      no  38.73 38.64 177.5
cifar100 ViT-B_16 GN      no  38.18 38.00 181.4
cifar100 ViT-B_16 Rescale no  36.09 35.54 162.6
cifar100 ViT-B_32 LN      no  42.84 42.74  68.4
cifar100 ViT-B_32 LN      yes 90.96 90.93  65.6
cifar100 ViT-B_32 BN      no  39.91 39.91  68.7
cifar100 ViT-B_32 GN      no  39.95 39.78  73.1
cifar100 ViT-B_32 Rescale no  37.80 37.61  67.5
cifar100 ViT-L_16 LN      no  40.23 40.20 303.9
cifar100 ViT-L_32 LN      no  42.78 42.58 144.6
cifar100 ViT-L_32 LN      yes 92.22 92.21 143.4
cifar100 ViT-L_32 BN      no  40.68 40.63 150.2
cifar100 ViT-L_32 GN      no  39.60 39.51 160.5
cifar100 ViT-L_32 Rescale no  37.59 37.29 143.6
"""
_BATCH = {"ViT-B_16": 128, "ViT-B_32": 128, "ViT-L_16": 64, "ViT-L_32": 128}
_DATASETS = ("cifar10", "cifar100")

# Keys that may differ from the published recipe. `match` checks the keys that
# identify a run.
_FREE = (
  "dataset",
  "model_name",
  "model.norm",
  "batch",
  "pretrained_path",
  "reinit_head",
  "seed",
  "dtype",
  "deterministic",
)
_COLUMNS = (
  "dataset",
  "model",
  "norm",
  "pretrained",
  "step",
  "valid_loss",
  "valid_accuracy",
)
_BOOLEANS = {"0": False, "1": True, "False": False, "True": True}


def _figures():
  figures = {}
  for line in _TABLE.strip().splitlines():
    dataset, model, norm, pretrained, best, last, minutes = line.split()
    figures[dataset, model, norm, pretrained == "yes"] = Figures(
      float(f"{best}e-2"), float(f"{last}e-2"), float(minutes)
    )
  return figures


FIGURES: Mapping[Key, Figures] = _figures()


def match(config: ml_collections.ConfigDict) -> Key | None:
  """Return the key of the published recipe that a config repeats, or None.

  Seed, dtype, determinism and keys that may change on resume are ignored. A key
  may be missing in `FIGURES`, since some published runs are incomplete. A file
  named MODEL.npz is assumed to hold the published weights.
  """
  values, recipe = map(config_lib.flatten, (config, config_lib.default()))
  if any(
    values[name] != recipe[name]
    for name, key in keys.KEYS.items()
    if not key.resumable and name not in _FREE
  ):
    return None
  if config.dataset not in _DATASETS:
    return None
  if config.batch != _BATCH.get(config.model_name):
    return None
  path = config.pretrained_path
  if path is not None and pathlib.Path(path).name != f"{config.model_name}.npz":
    return None
  return (
    config.dataset,
    config.model_name,
    config.model.norm,
    config.pretrained_path is not None,
  )


def read_curves(path: str | os.PathLike[str]) -> dict[Key, Curve]:
  """Read the curves of published runs from a CSV file.

  Args:
    path: a file with the columns dataset, model, norm, pretrained (0 or 1),
      step, valid_loss and valid_accuracy (a fraction); others are ignored.

  Raises:
    UserError: the file cannot be read, or a column or a value is invalid.
  """
  rows: dict[Key, dict[int, tuple[float, float]]] = {}
  try:
    with open(path, encoding="utf-8-sig", newline="") as f:
      reader = csv.DictReader(f, restval="")
      if missing := set(_COLUMNS).difference(reader.fieldnames or ()):
        raise errors.UserError(
          f"{path}: line 1: has no column {', '.join(sorted(missing))}; give"
          f" {','.join(_COLUMNS)}"
        )
      for row in reader:
        where = f"{path}: line {reader.line_num}"
        key, step, point = _read_row(row, where)
        if step in rows.setdefault(key, {}):
          raise errors.UserError(f"{where}: repeats step {step}; remove a line")
        rows[key][step] = point
  except OSError as e:
    raise errors.UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (UnicodeDecodeError, csv.Error) as e:
    raise errors.UserError(f"{path}: is not a CSV file ({e})") from e
  return {key: _curve(points) for key, points in rows.items()}


def _read_row(row, where):
  def value(column, kind, meaning, valid):
    text = row[column]
    try:
      number = kind(text)
    except (KeyError, ValueError):
      number = None
    if number is None or not valid(number):
      raise errors.UserError(
        f"{where}: {column} is {text!r}, but must be {meaning}"
      )
    return number

  names = [value(column, str, "a name", bool) for column in _COLUMNS[:3]]
  pretrained = value(
    "pretrained", _BOOLEANS.__getitem__, "0 or 1", lambda x: True
  )
  step = value("step", int, "a number of steps", lambda x: x >= 0)
  loss = value("valid_loss", float, "a number", math.isfinite)
  accuracy = value(
    "valid_accuracy", float, "a fraction in [0, 1]", lambda x: 0 <= x <= 1
  )
  return (*names, pretrained), step, (loss, accuracy)


def _curve(points):
  steps = sorted(points)
  return Curve(
    tuple(steps),
    tuple(points[step][0] for step in steps),
    tuple(points[step][1] for step in steps),
  )
