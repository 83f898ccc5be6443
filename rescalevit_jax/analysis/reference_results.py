"""Published results of RescaleViT and of Google, for comparison.

From github.com/ChaofanTao/RescaleViT: the tables of its README (published/
table.csv: 40 best accuracies and durations) and its logs (folder output;
curves.csv). One run each, fp16, one RTX 3090. Last accuracies and curves exist
for the 27 runs whose log is complete.

From github.com/google-research/vision_transformer at c6de1e5: the tables of
fine-tuning on CIFAR of its README (published/google.csv).
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
_EVALUATIONS = 200  # Of a complete log.
_BATCH = {"ViT-B_16": 128, "ViT-B_32": 128, "ViT-L_16": 64, "ViT-L_32": 128}
_DATASETS = ("cifar10", "cifar100")
# Keys that may differ from the published recipe. `match` checks the keys that
# identify a run.
_FREE = (
  "dataset",
  "model_name",
  "model.norm",
  "pretrained_path",
  "reinit_head",
  "seed",
  "dtype",
  "deterministic",
)
# Google's recipe: what differs from RescaleViT's.
_GOOGLE = {
  "data.train_split": "train[:98%]",
  "model.gelu": "tanh",
  "image_size": 384,
  "batch": 512,
  "augment.flip": True,
}
_FREE_OF_GOOGLE = (
  "accum_steps",
  "model.dropout_rate",
  "total_steps",
  "warmup_steps",
)
# Rates that Google's code uses; some rows do not state theirs.
_GOOGLES_DROPOUT = ("0.0", "0.1")

# Dataset, model_name, norm, True for pretrained weights.
Key = tuple[str, str, str, bool]


@dataclasses.dataclass(frozen=True)
class Figures:
  """The results of a published run. Test accuracies are fractions."""

  best_accuracy: float | None  # Of 200 evaluations; None for Google's.
  last_accuracy: float | None  # None if the log is incomplete.
  minutes: float  # RescaleViT's on one RTX 3090.
  publisher: str = "RescaleViT"


@dataclasses.dataclass(frozen=True)
class Curve:
  """Test loss in nats and accuracy as a fraction, by ascending steps."""

  steps: tuple[int, ...]
  loss: tuple[float, ...]
  accuracy: tuple[float, ...]


def _rows(name):
  with open(_FOLDER / name, encoding="utf-8", newline="") as f:
    return list(csv.DictReader(f))


def _key(row) -> Key:
  return row["dataset"], row["model"], row["norm"], row["pretrained"] == "1"


def _percent(text):
  return float(f"{text}e-2")  # The nearest fraction.


@functools.cache
def curves() -> Mapping[Key, Curve]:
  """Return the curves of all RescaleViT's runs with a complete log."""
  points: dict[Key, list[tuple[int, float, float]]] = {}
  for row in _rows("curves.csv"):
    loss, accuracy = float(row["valid_loss"]), float(row["valid_accuracy"])
    point = int(row["step"]), loss, accuracy
    points.setdefault(_key(row), []).append(point)
  return {
    key: Curve(*zip(*sorted(found), strict=True))
    for key, found in points.items()
    if len(found) == _EVALUATIONS
  }


@functools.cache
def figures() -> Mapping[Key, Figures]:
  """Return the results of all RescaleViT's runs."""
  found = {}
  for row in _rows("table.csv"):
    best, last = _percent(row["best_accuracy_percent"]), None
    if log := curves().get(_key(row)):  # More digits.
      best, last = max(log.accuracy), log.accuracy[-1]
    found[_key(row)] = Figures(best, last, float(row["minutes_rtx3090"]))
  return found


@functools.cache
def google() -> Mapping[tuple[str, str, int, int, str], Figures]:
  """Return Google's results.

  The key is dataset, model, steps, warm-up steps and dropout rate, '' if the
  rate is not published.
  """
  return {
    (
      row["dataset"],
      row["model"],
      int(row["total_steps"]),
      int(row["warmup_steps"]),
      row["dropout_rate"],
    ): Figures(
      None, _percent(row["accuracy_percent"]), float(row["minutes"]), "Google"
    )
    for row in _rows("google.csv")
  }


def find(config: ml_collections.ConfigDict) -> Figures | None:
  """Return the published results of the recipe that a config repeats, or None.

  Seed, dtype, determinism and keys that may change on resume are ignored, also
  accum_steps in Google's recipe. A file named MODEL.npz is assumed to hold the
  published weights.
  """
  if (key := match(config)) is not None:
    return figures().get(key)
  if config.model.norm != "LN" or config.pretrained_path is None:
    return None
  first = (config.dataset, config.model_name) == ("cifar10", "ViT-B_16")
  recipe = _GOOGLE | {"base_lr": 0.01 if first else 0.03}
  if not _repeats(config, recipe, _FREE_OF_GOOGLE):
    return None
  steps = config.total_steps, config.warmup_steps
  run = (config.dataset, config.model_name, *steps)
  rate = str(config.model.dropout_rate)
  unstated = google().get((*run, "")) if rate in _GOOGLES_DROPOUT else None
  return google().get((*run, rate), unstated)


def curve(config: ml_collections.ConfigDict) -> Curve | None:
  """Return the published curve of the recipe that a config repeats, or None."""
  key = match(config)
  return None if key is None else curves().get(key)


def match(config: ml_collections.ConfigDict) -> Key | None:
  """Return the key of RescaleViT's recipe that a config repeats, or None.

  See `find` for the keys that are ignored. A key may be missing in `figures()`,
  since some published runs are incomplete.
  """
  if (
    config.dataset not in _DATASETS
    or config.batch != _BATCH.get(config.model_name)
    or not _repeats(config, {}, ("batch",))
  ):
    return None
  return (
    config.dataset,
    config.model_name,
    config.model.norm,
    config.pretrained_path is not None,
  )


def _repeats(config, recipe, free):
  """Return whether a config is RescaleViT's with the changes of `recipe`.

  The keys of `_FREE` and `free` may have any value.
  """
  path = config.pretrained_path
  names = (config.model_name, f"{config.model_name}.npz")
  if path is not None and pathlib.Path(path).name not in names:
    return False
  values = config_lib.flatten(config)
  expected = config_lib.flatten(config_lib.default()) | recipe
  return all(
    values[name] == expected[name]
    for name, key in keys.KEYS.items()
    if not key.resumable and name not in (*_FREE, *free)
  )
