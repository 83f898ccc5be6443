"""Every config key: default, meaning and valid values, in one table."""

from collections.abc import Iterable

from rescalevit_jax import errors
from rescalevit_jax.config import augment_keys
from rescalevit_jax.config import key
from rescalevit_jax.config import model_keys
from rescalevit_jax.config import optim_keys
from rescalevit_jax.config import renamed
from rescalevit_jax.data import image_files
from rescalevit_jax.models import vit_config

KEYS = {
  "dataset": key.Key(
    "cifar10",
    "dataset of tfds with one label per image: `cifar10`, `cifar100`, `digits`"
    " (included in the package), ...; or `folder:PATH`, a folder of class"
    " folders of image files",
  ),
  "tfds_data_dir": key.Key(
    None,
    "folder of prepared datasets; None: `~/tensorflow_datasets`",
    optional=str,
    resumable=True,
  ),
  "data.source": key.Key(
    "auto",
    "storage of images during the run: on the devices (`resident`) or on disk"
    " (`streaming`); `auto`: on the devices if they take at most `data.max_gb`",
    ("auto", "resident", "streaming"),
    resumable=True,
  ),
  "data.max_gb": key.positive(
    4.0, "limit of `data.source=auto`, in 10^9 bytes", resumable=True
  ),
  "data.image_size": key.positive(
    None,
    "edge to resize images to when they are read, for datasets of mixed image"
    " sizes; None: no resizing",
    optional=int,
  ),
  "data.resize": key.Key(
    "squash",
    "resizing to `data.image_size`: stretch to a square (`squash`), or resize"
    " the short side and take the center (`crop`)",
    image_files.RESIZE_METHODS,
  ),
  "data.crop_ratio": key.positive_up_to_one(
    0.875,
    "with `data.resize=crop`: `data.image_size` / short side before the crop",
  ),
  "data.train_split": key.Key(
    "train", "split to train on, in the notation of tfds, such as `train[:10%]`"
  ),
  "data.test_split": key.Key(
    None,
    "split to evaluate on, in the same notation; None: `test`, or `validation`"
    " if there is no test split with labels",
    optional=str,
  ),
  "data.skip_damaged": key.Key(
    False, "leave out damaged images; the result counts those of the test split"
  ),
  "data.num_val": key.nonnegative(
    0,
    "size of a validation split, which is taken from the training images and"
    " replaces the test images; for tuning; 0: none",
  ),
  **model_keys.KEYS,
  "image_size": key.positive(224, "edge of the model's input in pixels"),
  "batch": key.positive(128, "images per update"),
  "batch_eval": key.positive(
    128,
    "images per evaluation step; results differ by rounding only",
    resumable=True,
  ),
  **optim_keys.KEYS,
  **augment_keys.KEYS,
  "accum_steps": key.positive(
    1, "micro-batches per update, of `batch / accum_steps` images each"
  ),
  "eval_every": key.positive(
    100, "steps between evaluations; the last step is always evaluated"
  ),
  "progress_every": key.positive(
    50, "steps between log lines and training metrics"
  ),
  "checkpoint_every": key.positive(
    1000,
    "steps between checkpoints; the best and the last step are always kept",
    resumable=True,
  ),
  "keep_checkpoints": key.positive(
    2, "number of recent checkpoints to keep", resumable=True
  ),
  "log_attention": key.Key(
    False,
    "write attention maps of the first test image to TensorBoard at each"
    " evaluation",
    resumable=True,
  ),
  "diagnostics_every": key.nonnegative(
    0,
    "steps between diagnostics: residual stream, gradients, updates, attention,"
    " sharpness; 0: none",
    resumable=True,
  ),
  "profile_steps": key.nonnegative(
    0, "number of steps to profile into `profile/`; 0: none", resumable=True
  ),
  "eval_weights": key.Key(
    "best",
    "weights for `--mode=eval`: `best` or `latest` checkpoint, `pretrained`"
    " file",
    ("best", "latest", "pretrained"),
    resumable=True,
  ),
  "eval_dataset": key.Key(
    None,
    "dataset that `--mode=eval` and `--mode=probe` evaluate on, with the run's"
    " classes, such as `cifar10_1`; `--mode=eval` also accepts"
    " `NAME/*` for all configs of a dataset, such as `cifar10_corrupted/*`;"
    " None: `dataset`",
    optional=str,
    resumable=True,
  ),
  "eval_split": key.Key(
    None,
    "split that `--mode=eval` and `--mode=probe` evaluate on, in tfds'"
    " notation, such as `validation`; None: as in training",
    optional=str,
    resumable=True,
  ),
  "save_predictions": key.Key(
    False,
    "write the logits and labels of an evaluation to `predictions.npz`",
    resumable=True,
  ),
  "pretrained_path": key.Key(
    None,
    "`.npz` file of initial weights, or the name of published ones, which are"
    " downloaded: `ViT-B_16` (ImageNet-21k), `augreg/FILE`; None: train from"
    " scratch",
    optional=str,
  ),
  "pretrained_allow_nonfinite": key.Key(
    False, "accept NaN and infinite weights in the `.npz`"
  ),
  "reinit_head": key.Key(
    False, "initialize the head with zeros even if the `.npz` has one that fits"
  ),
  "seed": key.Key(
    0,
    "seed of initialization, image order, augmentation and dropout",
    "in [0, 2^32)",
    lambda x: 0 <= x < 2**32,
  ),
  "dtype": key.Key(
    "auto",
    "dtype of the computation; `auto`: `bfloat16` on TPU and GPU, `float16` on"
    " a GPU without `bfloat16` (T4, V100), `float32` on a CPU",
    vit_config.DTYPES,
  ),
  "deterministic": key.Key(
    False, "bitwise reproducible runs on GPUs, at some cost in speed"
  ),
  "sharding.fsdp": key.Key(
    False,
    "save memory on several devices: shard parameters and optimizer state",
    resumable=True,
  ),
}


def check_key(name: str) -> None:
  """Raise UserError if there is no such key."""
  if name in renamed.KEYS:
    raise errors.UserError(f"config: {name} {renamed.hint(name)}")
  if name not in KEYS:
    raise errors.UserError(
      f"config: unknown key {name!r}; {errors.nearest(name, KEYS)}"
    )


def describe(row: str, names: Iterable[str] = KEYS) -> str:
  """Return a line per key, in a format with {name}, {default}, {meaning}."""
  return "\n".join(
    row.format(
      name=name, default=KEYS[name].default, meaning=KEYS[name].description
    )
    for name in names
  )
