"""The config of a Vision Transformer, and the sizes of the published ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from rescalevit_jax import errors
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import pointwise
from rescalevit_jax.models.ops import attention as attention_lib
from rescalevit_jax.runtime import accelerator

GELUS = ("erf", "tanh")
POOLS = ("cls", "gap")
RESIDUALS = ("auto", *residuals.RESIDUALS)
NORM_POSITIONS = ("pre", "post", "peri")
DTYPES = ("auto", "float32", "bfloat16", "float16")

SIZES = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
_POSITIVE = (
  *SIZES,
  *("num_classes", "image_size", "representation_size"),
  *("residual_c", "layerscale_init", "gn_groups", "norm_epsilon"),
  "logit_cap",
)
_FRACTIONS = ("dropout_rate", "stochastic_depth", "bn_momentum")
# Ti to H: Dosovitskiy et al. 2021 (arXiv:2010.11929), Table 1, and Steiner et
# al. 2022 (arXiv:2106.10270), Table 2. XS is ours, for small images on a CPU.
VARIANTS = {
  name: dict(zip(SIZES, sizes, strict=True))
  for name, sizes in {
    "ViT-XS_2": (2, 64, 256, 4, 4),
    "ViT-XS_4": (4, 64, 256, 4, 4),
    "ViT-Ti_16": (16, 192, 768, 3, 12),
    "ViT-S_16": (16, 384, 1536, 6, 12),
    "ViT-B_16": (16, 768, 3072, 12, 12),
    "ViT-B_32": (32, 768, 3072, 12, 12),
    "ViT-L_16": (16, 1024, 4096, 16, 24),
    "ViT-L_32": (32, 1024, 4096, 16, 24),
    "ViT-H_14": (14, 1280, 5120, 16, 32),
  }.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """The definition of a Vision Transformer."""

  num_classes: int
  patch_size: int  # Edge of a square patch, in pixels.
  hidden_size: int  # Width D of a token.
  mlp_dim: int  # Width of the hidden layer of the MLP.
  num_heads: int
  num_layers: int  # Encoder blocks.
  image_size: int = 224  # Edge of the square images, in pixels.
  norm: str = "LN"  # A key of `norms.NORMS`.
  alpha_init: str | float | None = None  # See `pointwise.parse_alphas`.
  norm_position: str = "pre"  # See `vit.EncoderBlock`, also for the next one.
  norm_depth_scaling: bool = False
  embedding_norm: bool = False  # True if a norm follows the position embedding.
  norm_epsilon: float = base.Options.epsilon
  bn_momentum: float = base.Options.momentum
  gn_groups: int = base.Options.groups
  norm_schedule: Any = None  # See `norms.gradual.Gradual`.
  residual: str = "auto"  # A key of `residuals.RESIDUALS`; auto: the norm's.
  residual_c: float | None = None  # c of `rescalenet`; None: twice num_layers.
  layerscale_init: float | None = None  # Of `layerscale`; None: by depth.
  qk_norm: bool = False  # See `vit.MultiHeadAttention`.
  logit_cap: float | None = None  # See `ops.attention.probabilities`.
  sigma_reparam: bool = False  # See `sigma`; in the blocks' linear layers.
  dropout_rate: float = 0.1  # After the embedding and twice in each MLP.
  stochastic_depth: float = 0.0  # Of the last block; see `vit.EncoderBlock`.
  # Input of the head: the class token (cls) or the mean of the patches (gap).
  # Both have the same parameters.
  pool: str = "cls"
  gelu: str = "erf"  # As in RescaleViT, or tanh as in Google's code.
  attention: str = "auto"  # xla or cudnn; auto: cudnn if it can run here.
  remat: bool = False  # Recompute activations to save memory.
  init: str = "torch"  # A key of `initializers.SCHEMES`.
  representation_size: int | None = None  # Of Google's `pre_logits` layer.
  # Of the computation; auto: see `choose_dtype`. Parameters, norm statistics,
  # softmax and logits are float32.
  dtype: str = "float32"

  def __post_init__(self):
    for value, valid, key in (
      (self.norm, norms.NORMS, "model.norm"),
      (self.norm_position, NORM_POSITIONS, "model.norm_position"),
      (self.residual, RESIDUALS, "model.residual"),
      (self.pool, POOLS, "model.pool"),
      (self.gelu, GELUS, "model.gelu"),
      (self.attention, attention_lib.IMPLEMENTATIONS, "model.attention"),
      (self.init, initializers.SCHEMES, "model.init"),
      (self.dtype, DTYPES, "dtype"),
    ):
      if value not in valid:
        raise errors.UserError(
          f"{key}: unknown {value!r}; {errors.nearest(str(value), valid)}"
        )
    for key in _POSITIVE:
      value = getattr(self, key)
      if value is not None and not value > 0:
        prefix = "" if key in ("num_classes", "image_size") else "model."
        raise errors.UserError(
          f"{prefix}{key}: {value} is not > 0; choose a larger value"
        )
    for key in _FRACTIONS:
      value = getattr(self, key)
      if value is None or not 0 <= value < 1:
        raise errors.UserError(
          f"model.{key}: {value} is not in [0, 1); choose another value"
        )
    if self.image_size % self.patch_size:
      raise errors.UserError(
        f"image_size: {self.image_size} is not divisible by the patch size"
        f" {self.patch_size}; choose a multiple"
      )
    if self.hidden_size % self.num_heads:
      raise errors.UserError(
        f"model.hidden_size: {self.hidden_size} is not divisible by the"
        f" {self.num_heads} heads; choose a multiple"
      )
    self._check_placement()
    self._check_residual()
    for site in base.SITES:
      norms.NORMS[self.norm].check(self.hidden_size, self.norm_options(site))

  @property
  def scheme(self) -> initializers.Scheme:
    """The initializers of the parameters."""
    return initializers.SCHEMES[self.init]

  @property
  def head_dim(self) -> int:
    """The number of channels of an attention head."""
    return self.hidden_size // self.num_heads

  def _check_placement(self):
    """Raise a UserError if the norm does not support its position."""
    for key, default in (
      ("norm_position", "pre"),
      ("norm_depth_scaling", False),
      ("embedding_norm", False),
    ):
      value = getattr(self, key)
      if value != default and not norms.NORMS[self.norm].FINAL:
        raise errors.UserError(
          f"model.{key}: the norm {self.norm} does not support {value}; choose"
          f" {default}"
        )
    if self.norm_position == "post" and self.norm_depth_scaling:
      raise errors.UserError(
        "model.norm_depth_scaling: scales the norms before branches, which"
        " norm_position=post does not have; choose pre or peri"
      )

  def _check_residual(self):
    """Raise a UserError if a constant is of another residual."""
    own = norms.NORMS[self.norm].RESIDUAL
    chosen = own if self.residual == "auto" else self.residual
    for key, residual in (
      ("residual_c", "rescalenet"),
      ("layerscale_init", "layerscale"),
    ):
      value = getattr(self, key)
      if value is not None and chosen != residual:
        raise errors.UserError(
          f"model.{key}: {value} has no effect with the residual {chosen};"
          f" choose None, or model.residual={residual}"
        )

  def norm_slot(self, number: int) -> str:
    """Return the name of a block's norm: number 0 (attention) or 2 (MLP)."""
    prefix = "Post" if self.norm_position == "post" else ""
    return f"{prefix}{norms.NORMS[self.norm].SLOT}_{number}"

  def norm_options(self, site: str) -> base.Options:
    """Return the options of the norms at a kind of site, one of `SITES`."""
    alphas = pointwise.parse_alphas(self.alpha_init)
    return base.Options(
      alpha=alphas[base.SITES.index(site)],
      epsilon=self.norm_epsilon,
      momentum=self.bn_momentum,
      groups=self.gn_groups,
    )

  def resolve(self) -> "ViTConfig":
    """Return the config with each 'auto' resolved for this machine."""
    residual, dtype, attention = self.residual, self.dtype, self.attention
    if residual == "auto":
      residual = norms.NORMS[self.norm].RESIDUAL
    if dtype == "auto":
      dtype = choose_dtype()
    if attention != "xla":
      problem = attention_lib.cudnn_problem(
        jnp.dtype(dtype), self.head_dim, self.logit_cap
      )
      if problem and attention == "cudnn":
        raise errors.UserError(
          f"model.attention: {problem}; choose auto or xla"
        )
      attention = "xla" if problem else "cudnn"
    return dataclasses.replace(
      self, residual=residual, dtype=dtype, attention=attention
    )


def choose_dtype() -> str:
  """Return the dtype that 'auto' selects on this machine.

  It is float32 on a CPU, and float16 on an NVIDIA GPU before Ampere (compute
  capability 8.0), which has no bfloat16. Elsewhere it is bfloat16.
  """
  if accelerator.platform() == "cpu":
    return "float32"
  has_no_bfloat16 = (0, 0) < accelerator.current().compute_capability < (8, 0)
  return "float16" if has_no_bfloat16 else "bfloat16"
