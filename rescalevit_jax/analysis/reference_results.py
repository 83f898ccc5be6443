"""Published results of RescaleViT, for comparison.

From github.com/ChaofanTao/RescaleViT: the tables of its README (published/
table.csv: 40 best accuracies and durations) and its logs (folder output;
runs.csv and curves.csv). One run each, fp16, one RTX 3090. Last accuracies and
curves exist for the 27 runs whose log is complete.
"""

from collections.abc import Mapping
import csv
import dataclasses
import functools
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax.config import keys

_FOLDER = pathlib.Path(__file__).parent / "published"
_EVALUATIONS = "200"  # Of a complete log.

# Dataset, model_name, norm, True for pretrained weights.
Key = tuple[str, str, str, bool]


@dataclasses.dataclass(frozen=True)
class Figures:
  """The results of a published run.

  Attributes:
    best_accuracy: highest test accuracy of 200 evaluations, as a fraction.
    last_accuracy: test accuracy after the last step, as a fraction; None if the
      log is incomplete.
    minutes: duration on one RTX 3090.
  """

  best_accuracy: float
  last_accuracy: float | None
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


def _key(row) -> Key:
  return (
    row["dataset"],
    row["model"],
    row["norm"],
    row["pretrained"] in ("1", "True"),
  )


def _rows(name):
  with open(_FOLDER / name, encoding="utf-8", newline="") as f:
    return list(csv.DictReader(f))


def _complete_runs():
  return {
    _key(row): row
    for row in _rows("runs.csv")
    if row["evaluations"] == _EVALUATIONS
  }


def _figures():
  runs, figures = _complete_runs(), {}
  for row in _rows("table.csv"):
    best, last = float(f"{row['best_accuracy_percent']}e-2"), None
    if (run := runs.get(_key(row))) is not None:  # More digits.
      best = float(run["best_accuracy_seen"])
      last = float(run["last_accuracy"])
    figures[_key(row)] = Figures(best, last, float(row["minutes_rtx3090"]))
  return figures


FIGURES: Mapping[Key, Figures] = _figures()


@functools.cache
def curves() -> Mapping[Key, Curve]:
  """Return the curves of all runs with a complete log."""
  complete = _complete_runs()
  rows: dict[Key, list[tuple[int, float, float]]] = {}
  for row in _rows("curves.csv"):
    if (key := _key(row)) in complete:
      rows.setdefault(key, []).append(
        (
          int(row["step"]),
          float(row["valid_loss"]),
          float(row["valid_accuracy"]),
        )
      )
  return {key: Curve(*zip(*sorted(x), strict=True)) for key, x in rows.items()}


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
  names = (config.model_name, f"{config.model_name}.npz")
  if path is not None and pathlib.Path(path).name not in names:
    return None
  return (
    config.dataset,
    config.model_name,
    config.model.norm,
    config.pretrained_path is not None,
  )
