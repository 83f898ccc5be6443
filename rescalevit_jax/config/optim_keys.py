"""Config keys of the optimizer."""

from rescalevit_jax.config import key
from rescalevit_jax.optim import groups
from rescalevit_jax.optim import lr_schedule
from rescalevit_jax.optim import optimizers

_TABLE = "`PATTERN:FACTOR ...`, such as `scalars:0.02 head/*:10`"

KEYS = {
  "base_lr": key.positive(0.05, "learning rate at the end of the warm-up"),
  "warmup_steps": key.nonnegative(500, "steps of linear warm-up"),
  "decay_type": key.Key(
    "cosine",
    "decay of the learning rate to `min_lr`; `sqrt`: 1 - sqrt(p), p in [0, 1]",
    lr_schedule.DECAYS,
  ),
  "decay_steps": key.positive(
    None,
    "steps of decay at the end of the run, after a constant learning rate"
    " (WSD); None: all steps after the warm-up",
    optional=int,
  ),
  "min_lr": key.nonnegative(0.0, "learning rate of the last step"),
  "total_steps": key.positive(20_000, "number of updates"),
  "optimizer": key.Key(
    "sgd",
    "optimizer; `muon`: Muon for the kernels of the blocks, AdamW for the rest",
    optimizers.OPTIMIZERS,
  ),
  "momentum": key.below_one(0.9, "momentum of SGD and Muon, beta_1 of AdamW"),
  "adam_b2": key.below_one(0.999, "beta_2 of AdamW"),
  "weight_decay": key.nonnegative(
    0.0,
    "weight decay: coupled, of all parameters (SGD); decoupled, of kernels"
    " (AdamW, Muon)",
  ),
  "grad_norm_clip": key.nonnegative(
    1.0, "maximum global gradient norm; 0: no clipping"
  ),
  "spectral_cap": key.nonnegative(
    0.0,
    "maximum singular value of the blocks' kernels after each step, as a"
    " multiple of sqrt(outputs / inputs); 0: no cap",
  ),
  "agc": key.nonnegative(
    0.0,
    "adaptive gradient clipping: maximum ratio of gradient norm to weight norm"
    " per unit; 0: no clipping",
  ),
  "lr_mult": key.Key(
    None,
    "learning-rate multipliers of groups of parameters; the first matching"
    " pattern applies; None: no multipliers",
    _TABLE,
    groups.is_table,
    optional=str,
  ),
  "wd_mult": key.Key(
    None,
    "weight-decay multipliers of groups of parameters; a parameter without a"
    " matching pattern decays as without multipliers; None: no multipliers",
    _TABLE,
    groups.is_table,
    optional=str,
  ),
  "layer_decay": key.positive_up_to_one(
    1.0,
    "learning-rate multiplier for each block between a parameter and the head",
  ),
  "sam_rho": key.nonnegative(
    0.0,
    "rho of SAM: distance from the weights to the point of the second gradient,"
    " such as 0.05; 0: no SAM",
  ),
  "ema_decay": key.below_one(
    0.0,
    "decay per step of the moving average of weights and statistics, which is"
    " evaluated and saved as the best checkpoint; 0: no average",
  ),
  "label_smoothing": key.below_one(
    0.0,
    "label smoothing: fraction of the target spread evenly over all classes",
  ),
}
