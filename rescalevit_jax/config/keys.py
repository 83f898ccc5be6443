"""Every config key: default, meaning and valid values, in one table."""

from collections.abc import Iterable

from rescalevit_jax import errors
from rescalevit_jax.config import key as key_lib
from rescalevit_jax.config import recipe_keys
from rescalevit_jax.config import renamed
from rescalevit_jax.data import image_files
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.ops import attention

KEYS = {
  "dataset": key_lib.Key(
    "cifar10",
    "dataset of tfds with one label per image: `cifar10`, `cifar100`,"
    " `digits` (included in the package), ...; or `folder:PATH`, a folder of"
    " class folders of image files",
  ),
  "tfds_data_dir": key_lib.Key(
    None,
    "folder of prepared datasets; None: `~/tensorflow_datasets`",
    optional=str,
    resumable=True,
  ),
  "data.source": key_lib.Key(
    "auto",
    "storage of images during the run: on the devices (`resident`) or on"
    " disk (`streaming`); `auto`: on the devices if they take at most"
    " `data.max_gb`",
    ("auto", "resident", "streaming"),
    resumable=True,
  ),
  "data.max_gb": key_lib.positive(
    4.0, "limit of `data.source=auto`, in 10^9 bytes", resumable=True
  ),
  "data.image_size": key_lib.positive(
    None,
    "edge to resize images to when they are read, for datasets of mixed"
    " image sizes; None: no resizing",
    optional=int,
  ),
  "data.resize": key_lib.Key(
    "squash",
    "resizing to `data.image_size`: stretch to a square (`squash`), or resize"
    " the short side and take the center (`crop`)",
    image_files.RESIZE_METHODS,
  ),
  "data.crop_ratio": key_lib.Key(
    0.875,
    "with `data.resize=crop`: `data.image_size` over the short side before the"
    " crop",
    "in (0, 1]",
    lambda x: 0 < x <= 1,
  ),
  "data.train_split": key_lib.Key(
    "train",
    "split to train on, in the notation of tfds, such as `train[:10%]`",
  ),
  "data.test_split": key_lib.Key(
    None,
    "split to evaluate on, in the same notation; None: `test`, or `validation`"
    " if there is no test split with labels",
    optional=str,
  ),
  "data.skip_damaged": key_lib.Key(
    False, "leave out images that cannot be read; the result counts them"
  ),
  "data.num_val": key_lib.at_least(
    0,
    0,
    "size of a validation split, which is taken from the training images"
    " and replaces the test images; for tuning; 0: none",
  ),
  "model_name": key_lib.Key(
    "ViT-B_16", "size of the model", vit_config.VARIANTS
  ),
  "model.norm": key_lib.Key("LN", "normalization layer", norms.NORMS),
  "model.alpha_init": key_lib.Key(
    None,
    "initial alpha of a pointwise norm (DyT, Derf, ISRU, ...): a number, or"
    " `calibrated` for 1 / RMS of the site's input in 8 training batches; or"
    " three of them with commas, for attention, MLP and final norm; None: the"
    " norm's own",
    optional=str,
  ),
  "model.norm_position": key_lib.Key(
    "pre",
    "norms before each branch (`pre`), after each addition (`post`), or before"
    " and after each branch (`peri`)",
    vit_config.NORM_POSITIONS,
  ),
  "model.norm_depth_scaling": key_lib.Key(
    False, "multiply the norms before the branches of block l by l^(-1/2)"
  ),
  "model.embedding_norm": key_lib.Key(
    False, "another norm after the position embedding"
  ),
  "model.norm_epsilon": key_lib.positive(
    base.Options.epsilon, "constant added to variances and mean squares"
  ),
  "model.bn_momentum": key_lib.below_one(
    base.Options.momentum,
    "momentum of the running statistics of BN, BN2 and PRepBN",
  ),
  "model.gn_groups": key_lib.positive(
    base.Options.groups, "number of groups of GN"
  ),
  "model.residual": key_lib.Key(
    "auto",
    "residual connection; `auto`: `rescalevit` with Rescale, `weighted` with"
    " Center, `plain` with all other norms",
    vit_config.RESIDUALS,
  ),
  "model.residual_c": key_lib.positive(
    None,
    "constant c of `residual=rescalenet`; None: twice the number of encoder"
    " blocks",
    optional=float,
  ),
  "model.layerscale_init": key_lib.positive(
    None,
    "initial scale of `residual=layerscale`; None: 0.1 with up to 18 blocks,"
    " 1e-5 with up to 24, else 1e-6",
    optional=float,
  ),
  "model.qk_norm": key_lib.Key(
    False, "RMSNorm of queries and keys in each head"
  ),
  "model.sigma_reparam": key_lib.Key(
    False,
    "sigmaReparam: linear layers in the blocks learn their largest singular"
    " value",
  ),
  "model.dropout_rate": key_lib.below_one(
    0.1, "dropout rate after the embedding and in the MLP"
  ),
  "model.stochastic_depth": key_lib.below_one(
    0.0,
    "drop probability of the branches of the last block; increases linearly"
    " from 0 with depth",
  ),
  "model.pool": key_lib.Key(
    "cls",
    "input of the head: class token (`cls`) or mean of the patch tokens"
    " (`gap`)",
    vit_config.POOLS,
  ),
  "model.gelu": key_lib.Key(
    "erf",
    "GELU: exact (`erf`, as RescaleViT) or approximate (`tanh`, as Google's"
    " code)",
    vit_config.GELUS,
  ),
  "model.init": key_lib.Key(
    "torch",
    "initialization: as RescaleViT (`torch`), as Google's code (`google`),"
    " or unit variance of tokens and layer outputs (`unit`)",
    initializers.SCHEMES,
  ),
  "model.attention": key_lib.Key(
    "auto",
    "implementation of attention, XLA or cuDNN; results differ by rounding"
    " only",
    attention.IMPLEMENTATIONS,
    resumable=True,
  ),
  "model.remat": key_lib.Key(
    False,
    "save memory: recompute the activations of each block in the backward pass",
    resumable=True,
  ),
  "model.representation_size": key_lib.positive(
    None,
    "width of Google's `pre_logits` layer; None: no such layer",
    optional=int,
  ),
  "model.patch_size": key_lib.size("edge of a patch in pixels"),
  "model.hidden_size": key_lib.size("width of a token"),
  "model.mlp_dim": key_lib.size("width of the MLP"),
  "model.num_heads": key_lib.size("number of attention heads"),
  "model.num_layers": key_lib.size("number of encoder blocks"),
  "image_size": key_lib.positive(224, "edge of the model's input in pixels"),
  "batch": key_lib.positive(128, "images per update"),
  "batch_eval": key_lib.positive(
    128,
    "images per evaluation step; results differ by rounding only",
    resumable=True,
  ),
  **recipe_keys.KEYS,
  "accum_steps": key_lib.positive(
    1, "micro-batches per update, of `batch / accum_steps` images each"
  ),
  "eval_every": key_lib.positive(
    100, "steps between evaluations; the last step is always evaluated"
  ),
  "progress_every": key_lib.positive(
    50, "steps between log lines and training metrics"
  ),
  "checkpoint_every": key_lib.positive(
    1000,
    "steps between checkpoints; the best and the last step are always kept",
    resumable=True,
  ),
  "keep_checkpoints": key_lib.positive(
    2, "number of recent checkpoints to keep", resumable=True
  ),
  "log_attention": key_lib.Key(
    False,
    "write attention maps of the first test image to TensorBoard at each"
    " evaluation",
    resumable=True,
  ),
  "diagnostics_every": key_lib.at_least(
    0,
    0,
    "steps between diagnostics: residual stream, gradients, updates,"
    " attention, sharpness; 0: none",
    resumable=True,
  ),
  "profile_steps": key_lib.at_least(
    0, 0, "number of steps to profile into `profile/`; 0: none", resumable=True
  ),
  "eval_weights": key_lib.Key(
    "best",
    "weights for `--mode eval`: the `best` or `latest` checkpoint, or the"
    " `pretrained` file",
    ("best", "latest", "pretrained"),
    resumable=True,
  ),
  "eval_dataset": key_lib.Key(
    None,
    "dataset that `--mode=eval` and `--mode=probe` evaluate on, with the run's"
    " classes, such as `cifar10_1`; for `--mode=eval`, `cifar10_corrupted/*`"
    " stands for all its configs; None: `dataset`",
    optional=str,
    resumable=True,
  ),
  "eval_split": key_lib.Key(
    None,
    "split that `--mode=eval` and `--mode=probe` evaluate on, in tfds'"
    " notation, such as `validation`; None: as in training",
    optional=str,
    resumable=True,
  ),
  "save_predictions": key_lib.Key(
    False,
    "write the logits and labels of an evaluation to `predictions.npz`",
    resumable=True,
  ),
  "pretrained_path": key_lib.Key(
    None,
    "`.npz` file of initial weights, or the name of published ones, which are"
    " downloaded: `ViT-B_16` (ImageNet-21k), `augreg/FILE`; None: train from"
    " scratch",
    optional=str,
  ),
  "pretrained_allow_nonfinite": key_lib.Key(
    False, "accept NaN and infinite weights in the `.npz`"
  ),
  "calibration": key_lib.Key(
    "auto",
    "norms to initialize from statistics of 8 training batches: Cal"
    " (`auto`), all pointwise norms (`all`), or none",
    ("auto", "all", "none"),
  ),
  "fade.begin": key_lib.Key(
    0.1,
    "fraction of the run at which the first site of the norms Fade, TaperLN,"
    " TaperRMS and PRepBN begins to fade",
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
  ),
  "fade.end": key_lib.Key(
    0.7,
    "fraction of the run at which the last site, the final norm, has faded",
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
  ),
  "fade.site_fraction": key_lib.Key(
    0.5,
    "duration of the fade of one site of Fade as a fraction of the time from"
    " begin to end; 1: all sites fade together, as with the other norms",
    "in (0, 1]",
    lambda x: 0 < x <= 1,
  ),
  "fade.separate_cls": key_lib.Key(
    True,
    "separate scales for class token and patches; if False, the faded norm"
    " folds into the next linear layers",
  ),
  "fade.alpha": key_lib.at_least(
    0,
    0.0,
    "alpha of the tanh that a faded site applies after division by its"
    " scale, such as 0.5 for DyT's initial value; 0: a linear map, as Cal",
  ),
  "taper.final": key_lib.Key(
    True, "whether the final norm of TaperLN and TaperRMS fades, too"
  ),
  "taper.anchor": key_lib.at_least(
    0,
    0.01,
    "weight of the anchor loss of TaperLN and TaperRMS with `taper.final`: the"
    " mean square difference of the size of the final norm's tokens from its"
    " mean before the fade",
  ),
  "reinit_head": key_lib.Key(
    False, "initialize the head with zeros even if the `.npz` has one that fits"
  ),
  "seed": key_lib.Key(
    0,
    "seed of initialization, image order, augmentation and dropout",
    "in [0, 2^32)",
    lambda x: 0 <= x < 2**32,
  ),
  "dtype": key_lib.Key(
    "auto",
    "dtype of the computation; `auto`: `bfloat16` on TPU and GPU, `float16`"
    " on a GPU without `bfloat16` (T4, V100), `float32` on a CPU",
    vit_config.DTYPES,
  ),
  "deterministic": key_lib.Key(
    False, "bitwise reproducible runs on GPUs, at some cost in speed"
  ),
  "sharding.fsdp": key_lib.Key(
    False,
    "save memory on several devices: shard parameters and optimizer state",
    resumable=True,
  ),
}


def check_key(name: str) -> None:
  """Raises UserError if there is no such key."""
  if name in renamed.KEYS:
    raise errors.UserError(f"config: {name} {renamed.hint(name)}")
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
