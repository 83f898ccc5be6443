"""Every config key: default, meaning and valid values, in one table."""

from collections.abc import Iterable

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.augment import preprocess
from rescalevit_jax.config import key as key_lib
from rescalevit_jax.config import renamed
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import variants
from rescalevit_jax.optim import optimizers

KEYS = {
  "dataset": key_lib.Key(
    "cifar10",
    "`cifar10`, `cifar100`, `digits` (comes with the package), or another"
    " tfds data set of images with one label each",
  ),
  "tfds_data_dir": key_lib.Key(
    None,
    "where prepared data sets lie; None: `~/tensorflow_datasets`",
    optional=str,
    resumable=True,
  ),
  "data.source": key_lib.Key(
    "auto",
    "where images are during the run: on the devices (`resident`) or on disk"
    " (`streaming`); `auto`: on disk if they take more than `data.max_gb`",
    ("auto", "resident", "streaming"),
    resumable=True,
  ),
  "data.max_gb": key_lib.positive(
    4.0, "what images may take of a device, in 10^9 bytes", resumable=True
  ),
  "data.image_size": key_lib.positive(
    None,
    "edge that images are resized to as they are read, for data sets whose"
    " images differ in size; None: they stay as they are",
    optional=int,
  ),
  "data.num_val": key_lib.at_least(
    0,
    0,
    "training images to evaluate with in place of the test images, and not to"
    " train with: what settings are chosen by; 0: none",
  ),
  "model_name": key_lib.Key("ViT-B_16", "size of the model", variants.VARIANTS),
  "model.norm": key_lib.Key("LN", "the norm", norms.NORMS),
  "model.residual": key_lib.Key(
    "auto",
    "how a branch joins the stream; `auto`: `rescalevit` with Rescale, `plain`"
    " with all other norms",
    models.RESIDUALS,
  ),
  "model.residual_c": key_lib.positive(
    None,
    "c of `residual=rescalenet`; None: twice the encoder blocks",
    optional=float,
  ),
  "model.qk_norm": key_lib.Key(
    False, "RMSNorm of each head's queries and keys"
  ),
  "model.sigma_reparam": key_lib.Key(
    False,
    "the linear layers of the blocks learn their largest singular value"
    " (sigmaReparam)",
  ),
  "model.dropout_rate": key_lib.below_one(
    0.1, "dropout after the embedding and in the MLP"
  ),
  "model.stochastic_depth": key_lib.below_one(
    0.0,
    "probability that an image skips a branch of the last block; less before",
  ),
  "model.pool": key_lib.Key(
    "cls",
    "what the head sees: the class token, or the mean of the patches (`gap`)",
    models.POOLS,
  ),
  "model.gelu": key_lib.Key(
    "erf", "`erf` as RescaleViT, `tanh` as Google's code", models.GELUS
  ),
  "model.init": key_lib.Key(
    "torch",
    "start from scratch as RescaleViT (`torch`), as Google's code, or with"
    " tokens and layers of unit variance (`unit`)",
    initializers.SCHEMES,
  ),
  "model.attention": key_lib.Key(
    "auto",
    "how attention is computed, by XLA or by cuDNN; changes the result by"
    " rounding at most",
    models.ATTENTIONS,
    resumable=True,
  ),
  "model.remat": key_lib.Key(
    False,
    "save memory: training computes each block's inside twice",
    resumable=True,
  ),
  "model.representation_size": key_lib.positive(
    None,
    "width of Google's `pre_logits` layer; None: no such layer",
    optional=int,
  ),
  "model.patch_size": key_lib.size("edge of a patch, in pixels"),
  "model.hidden_size": key_lib.size("width of a token"),
  "model.mlp_dim": key_lib.size("width of the MLP"),
  "model.num_heads": key_lib.size("attention heads"),
  "model.num_layers": key_lib.size("encoder blocks"),
  "image_size": key_lib.positive(224, "edge of the model's input, in pixels"),
  "batch": key_lib.positive(128, "images an update"),
  "batch_eval": key_lib.positive(
    128,
    "images an evaluation step; changes the result by rounding at most",
    resumable=True,
  ),
  "base_lr": key_lib.positive(0.05, "learning rate at the end of the warm-up"),
  "warmup_steps": key_lib.at_least(0, 500, "steps of linear warm-up"),
  "decay_type": key_lib.Key(
    "cosine", "decay of the learning rate to 0", ("cosine", "linear")
  ),
  "total_steps": key_lib.positive(20_000, "updates of the run"),
  "optimizer": key_lib.Key(
    "sgd",
    "`muon`: Muon for the blocks' kernels, AdamW for the rest",
    optimizers.OPTIMIZERS,
  ),
  "momentum": key_lib.below_one(
    0.9, "momentum of SGD and Muon, beta_1 of AdamW"
  ),
  "adam_b2": key_lib.below_one(0.999, "beta_2 of AdamW"),
  "weight_decay": key_lib.at_least(
    0,
    0.0,
    "coupled weight decay of all parameters with SGD; decoupled one of kernels"
    " with AdamW and Muon",
  ),
  "grad_norm_clip": key_lib.at_least(
    0, 1.0, "largest global norm of a gradient; 0: any"
  ),
  "agc": key_lib.at_least(
    0,
    0.0,
    "adaptive gradient clipping: largest norm of a unit's gradient over that"
    " of its weights; 0: any",
  ),
  "scalar_lr_mult": key_lib.at_least(
    0,
    1.0,
    "learning rate of parameters that are one number (a place's alpha and"
    " shift, a branch's multiplier, a layer's gamma with sigma_reparam), in"
    " times the others'",
  ),
  "ema_decay": key_lib.below_one(
    0.0,
    "decay a step of the averaged weights and statistics, which then are what"
    " is evaluated and saved as the best; 0: no average",
  ),
  "accum_steps": key_lib.positive(
    1, "micro-batches an update; each has `batch / accum_steps` images"
  ),
  "eval_every": key_lib.positive(
    100, "steps between evaluations; the last step is always evaluated"
  ),
  "progress_every": key_lib.positive(
    50, "steps between progress lines and training metrics"
  ),
  "checkpoint_every": key_lib.positive(
    1000,
    "steps between checkpoints; the best and the last step are always kept",
    resumable=True,
  ),
  "keep_checkpoints": key_lib.positive(
    2, "how many of the last checkpoints to keep", resumable=True
  ),
  "log_attention": key_lib.Key(
    False,
    "attention pictures of the first test image to TensorBoard, at each"
    " evaluation",
    resumable=True,
  ),
  "diagnostics_every": key_lib.at_least(
    0,
    0,
    "steps between looks into the model: stream, gradients, updates, attention,"
    " sharpness; 0: none",
    resumable=True,
  ),
  "profile_steps": key_lib.at_least(
    0, 0, "steps to record into `profile/`; 0: none", resumable=True
  ),
  "eval_weights": key_lib.Key(
    "best",
    "what `--mode eval` evaluates: the `best` or `latest` checkpoint, or"
    " the `pretrained` file",
    ("best", "latest", "pretrained"),
    resumable=True,
  ),
  "pretrained_path": key_lib.Key(
    None, "`.npz` to start from; None: from scratch", optional=str
  ),
  "pretrained_allow_nonfinite": key_lib.Key(
    False, "start from an `.npz` even if it holds NaN or infinite weights"
  ),
  "calibration": key_lib.Key(
    "auto",
    "norms that start from statistics of the first 8 training batches: Cal"
    " (`auto`), Cal, DyT and Derf (`all`), or none",
    ("auto", "all", "none"),
  ),
  "fade.begin": key_lib.Key(
    0.1,
    "share of the steps after which the first place of the norm Fade begins to"
    " fade",
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
  ),
  "fade.end": key_lib.Key(
    0.7,
    "share of the steps after which the last place, the final norm, is done",
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
  ),
  "fade.site_fraction": key_lib.Key(
    0.5,
    "what a place takes of the time between; less: one place after the other,"
    " 1: all at once",
    "in (0, 1]",
    lambda x: 0 < x <= 1,
  ),
  "fade.separate_cls": key_lib.Key(
    True,
    "class token and patches have scales of their own; without, the result"
    " folds into the layers that follow",
  ),
  "fade.alpha": key_lib.at_least(
    0,
    0.0,
    "alpha of the tanh that a place ends as, after division by its scale: 0.5"
    " as DyT starts; 0: a linear map, as Cal",
  ),
  "reinit_head": key_lib.Key(
    False, "start with a head of zeros even where the `.npz` has one"
  ),
  "seed": key_lib.Key(
    0,
    "of initialization, order of images, crops and dropout",
    "in [0, 2^32)",
    lambda x: 0 <= x < 2**32,
  ),
  "dtype": key_lib.Key(
    "auto",
    "of the computation; `auto`: `bfloat16` on TPU and GPU, `float16` on a GPU"
    " without `bfloat16` (T4, V100), `float32` on a CPU",
    models.DTYPES,
  ),
  "deterministic": key_lib.Key(
    False, "the same bits in each run on a GPU too, at some cost in speed"
  ),
  "sharding.fsdp": key_lib.Key(
    False,
    "save memory on several devices: each keeps a part of parameters and"
    " momenta",
    resumable=True,
  ),
  "label_smoothing": key_lib.below_one(
    0.0, "share of a label that all classes have alike"
  ),
  "mixup": key_lib.at_least(
    0, 0.0, "alpha of mixup, which blends pairs of images; 0: none"
  ),
  "cutmix": key_lib.at_least(
    0,
    0.0,
    "alpha of CutMix, which puts a part of one image into another; with mixup,"
    " each image draws one of the two; 0: none",
  ),
  "augment.crop": key_lib.Key(
    True, "random crop (RandomResizedCrop) in training"
  ),
  "augment.min_area": key_lib.Key(
    0.05,
    "smallest share of the image in a crop",
    "in (0, 1]",
    lambda x: 0 < x <= 1,
  ),
  "augment.min_aspect": key_lib.Key(
    0.75,
    "smallest width / height of a crop; the largest is its inverse",
    "in [0.01, 1]",
    lambda x: 0.01 <= x <= 1,
  ),
  "augment.flip": key_lib.Key(False, "mirror half of the training images"),
  "augment.pad_crop": key_lib.at_least(
    0,
    0,
    "instead of `augment.crop`: shift by up to so many pixels, black comes in;"
    " 0: none",
  ),
  "augment.auto": key_lib.Key(
    "none",
    "`trivial`: TrivialAugment, a random operation before the crop",
    preprocess.AUTO,
  ),
  "augment.random_erasing": key_lib.Key(
    0.0,
    "share of the training images in which a box is replaced by noise",
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
  ),
}


def check_key(name: str) -> None:
  """Raises UserError if there is no such key."""
  if name in renamed.KEYS:
    raise errors.UserError(
      f"config: {name} is now named {renamed.KEYS[name]}; use the new name"
    )
  if name not in KEYS:
    raise errors.UserError(
      f"config: unknown key {name!r}; {errors.nearest(name, KEYS)}"
    )


def describe(row: str, names: Iterable[str] = KEYS) -> str:
  """Return one line per key, for --help and docs/configuration.md.

  Args:
    row: format of a line, with {name}, {default}, {meaning}.
    names: the keys to describe.
  """
  lines = []
  for name in names:
    key = KEYS[name]
    valid = key.valid
    if not isinstance(valid, str):
      valid = ", ".join(valid)
    meaning = f"{key.meaning} ({valid})" if valid else key.meaning
    lines.append(row.format(name=name, default=key.default, meaning=meaning))
  return "\n".join(lines)
