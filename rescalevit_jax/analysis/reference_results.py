"""Published results of RescaleViT and of Google, for comparison.

From github.com/ChaofanTao/RescaleViT: the tables of its README (published/
table.csv: 40 best accuracies and durations) and its logs (folder output;
runs.csv and curves.csv). One run each, fp16, one RTX 3090. Last accuracies and
curves exist for the 27 runs whose log is complete.

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
_EVALUATIONS = "200"  # Of a complete log.
# Rates that Google's code uses; some rows do not state theirs.
_GOOGLES_DROPOUT = ("0.0", "0.1")

# Dataset, model_name, norm, True for pretrained weights.
Key = tuple[str, str, str, bool]


@dataclasses.dataclass(frozen=True)
class Figures:
  """The results of a published run.

  Attributes:
    best_accuracy: highest test accuracy of 200 evaluations, as a fraction; None
      for Google's.
    last_accuracy: test accuracy after the last step, as a fraction; None if the
      log is incomplete.
    minutes: duration, RescaleViT's on one RTX 3090.
    publisher: 'RescaleViT' or 'Google'.
  """

  best_accuracy: float | None
  last_accuracy: float | None
  minutes: float
  publisher: str = "RescaleViT"


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
def google() -> Mapping[tuple[str, str, int, int], Mapping[str, Figures]]:
  """Return Google's results by dataset, model, steps and warm-up steps.

  The inner key is the dropout rate, '' if it is not published.
  """
  found: dict[tuple[str, str, int, int], dict[str, Figures]] = {}
  for row in _rows("google.csv"):
    steps = int(row["total_steps"]), int(row["warmup_steps"])
    found.setdefault((row["dataset"], row["model"], *steps), {})[
      row["dropout_rate"]
    ] = Figures(
      None,
      float(f"{row['accuracy_percent']}e-2"),
      float(row["minutes"]),
      "Google",
    )
  return found


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


def find(config: ml_collections.ConfigDict) -> Figures | None:
  """Return the published results of the recipe that a config repeats, or None.

  Seed, dtype, determinism and keys that may change on resume are ignored, also
  accum_steps in Google's recipe. A file named MODEL.npz is assumed to hold the
  published weights.
  """
  if (key := match(config)) is not None:
    return FIGURES.get(key)
  if config.model.norm != "LN" or config.pretrained_path is None:
    return None
  first = (config.dataset, config.model_name) == ("cifar10", "ViT-B_16")
  recipe = _GOOGLE | {"base_lr": 0.01 if first else 0.03}
  if not _repeats(config, recipe, _FREE_OF_GOOGLE):
    return None
  steps = config.total_steps, config.warmup_steps
  known = google().get((config.dataset, config.model_name, *steps), {})
  rate = str(config.model.dropout_rate)
  unstated = known.get("") if rate in _GOOGLES_DROPOUT else None
  return known.get(rate) or unstated


def _repeats(config, recipe, free):
  """Return whether a config equals RescaleViT's with some keys changed.

  Args:
    config: the config.
    recipe: the changed keys.
    free: keys that may have any value, besides `_FREE`.
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


def match(config: ml_collections.ConfigDict) -> Key | None:
  """Return the key of RescaleViT's recipe that a config repeats, or None.

  See `find` for the keys that are ignored. A key may be missing in `FIGURES`,
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
