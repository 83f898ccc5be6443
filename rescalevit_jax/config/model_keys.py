"""Config keys of the model, and of the calibration and schedules of norms."""

from rescalevit_jax.config import key
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.ops import attention

KEYS = {
  "model_name": key.Key("ViT-B_16", "size of the model", vit_config.VARIANTS),
  "model.norm": key.Key("LN", "normalization layer", norms.NORMS),
  "model.alpha_init": key.Key(
    None,
    "initial alpha of a pointwise norm (DyT, Derf, ISRU, ...), as text: a"
    " number, or `calibrated` for 1 / RMS of the site's input in 8 training"
    " batches; three values separated by commas: for attention, MLP and final"
    " norm; None: the norm's default",
    optional=str,
  ),
  "model.norm_position": key.Key(
    "pre",
    "norms before each branch (`pre`), after each addition (`post`), or before"
    " and after each branch (`peri`)",
    vit_config.NORM_POSITIONS,
  ),
  "model.norm_depth_scaling": key.Key(
    False, "multiply the norms before the branches of block l by l^(-1/2)"
  ),
  "model.embedding_norm": key.Key(False, "norm after the position embedding"),
  "model.norm_epsilon": key.positive(
    base.Options.epsilon, "constant added to variances and mean squares"
  ),
  "model.bn_momentum": key.below_one(
    base.Options.momentum,
    "momentum of the running statistics of BN, BN2 and PRepBN",
  ),
  "model.gn_groups": key.positive(
    base.Options.groups, "number of groups of GN"
  ),
  "model.residual": key.Key(
    "auto",
    "residual connection; `auto`: "
    + "".join(
      f"`{Norm.RESIDUAL}` with {name}, "
      for name, Norm in norms.NORMS.items()
      if Norm.RESIDUAL != base.Norm.RESIDUAL
    )
    + f"`{base.Norm.RESIDUAL}` with all other norms",
    vit_config.RESIDUALS,
  ),
  "model.residual_c": key.positive(
    None,
    "constant c of `residual=rescalenet`; None: twice the number of blocks",
    optional=float,
  ),
  "model.layerscale_init": key.positive(
    None,
    "initial scale of `residual=layerscale`; None: 0.1 with up to 18 blocks,"
    " 1e-5 with up to 24, else 1e-6",
    optional=float,
  ),
  "model.qk_norm": key.Key(False, "RMSNorm of queries and keys in each head"),
  "model.logit_cap": key.positive(
    None,
    "bound of the attention logits s: c * tanh(s / c); excludes cuDNN's"
    " attention; None: no bound",
    optional=float,
  ),
  "model.sigma_reparam": key.Key(
    False,
    "sigmaReparam: linear layers of blocks learn their largest singular value",
  ),
  "model.dropout_rate": key.below_one(
    0.1, "dropout rate after the embedding and in the MLP"
  ),
  "model.stochastic_depth": key.below_one(
    0.0,
    "drop probability of the branches of the last block; increases linearly"
    " from 0 with depth",
  ),
  "model.pool": key.Key(
    "cls",
    "input of the head: class token (`cls`) or mean of patch tokens (`gap`)",
    vit_config.POOLS,
  ),
  "model.gelu": key.Key(
    "erf",
    "GELU: exact (`erf`, as RescaleViT) or approximate (`tanh`, as Google)",
    vit_config.GELUS,
  ),
  "model.init": key.Key(
    "torch",
    "initialization: as RescaleViT (`torch`), as Google's code (`google`), or"
    " unit variance of tokens and layer outputs (`unit`)",
    initializers.SCHEMES,
  ),
  "model.attention": key.Key(
    "auto",
    "implementation of attention, XLA or cuDNN; results differ by rounding",
    attention.IMPLEMENTATIONS,
    resumable=True,
  ),
  "model.remat": key.Key(
    False,
    "save memory: recompute the activations of each block in the backward pass",
    resumable=True,
  ),
  "model.representation_size": key.positive(
    None,
    "width of Google's `pre_logits` layer; None: no such layer",
    optional=int,
  ),
  "model.patch_size": key.size("edge of a patch in pixels"),
  "model.hidden_size": key.size("width of a token"),
  "model.mlp_dim": key.size("width of the MLP"),
  "model.num_heads": key.size("number of attention heads"),
  "model.num_layers": key.size("number of encoder blocks"),
  "calibration": key.Key(
    "auto",
    "norms to initialize from statistics of 8 training batches: Cal (`auto`),"
    " all pointwise norms (`all`), or none",
    ("auto", "all", "none"),
  ),
  "fade.begin": key.up_to_one(
    0.1,
    "fraction of the run at which the first site begins to fade (norms Fade,"
    " TaperLN, TaperRMS and PRepBN)",
  ),
  "fade.end": key.up_to_one(
    0.7, "fraction of the run at which the last site, the final norm, has faded"
  ),
  "fade.site_fraction": key.positive_up_to_one(
    0.5,
    "duration of the fade of one site of Fade as a fraction of the time from"
    " begin to end; 1: all sites fade together, as with the other norms",
  ),
  "fade.separate_cls": key.Key(
    True,
    "separate scales for class token and patches; if False, the faded norm"
    " folds into the next linear layers",
  ),
  "fade.alpha": key.nonnegative(
    0.0,
    "alpha of the tanh that a faded site applies after division by its scale,"
    " such as 0.5 for DyT's initial value; 0: a linear map, as Cal",
  ),
  "taper.final": key.Key(
    True, "fade the final norm of TaperLN and TaperRMS, too"
  ),
  "taper.anchor": key.nonnegative(
    0.01,
    "weight of the anchor loss of TaperLN and TaperRMS with `taper.final`,"
    " which keeps the size of the final norm's input near its mean before the"
    " fade",
  ),
}
