"""Vision Transformers by name: `create("ViT-B_16", num_classes=10)`."""

import dataclasses

import jax.numpy as jnp

from rescalevit_jax import errors
from rescalevit_jax.models import fade as fade_lib
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import variants
from rescalevit_jax.models import vit
from rescalevit_jax.models.ops import attention as attention_lib
from rescalevit_jax.runtime import accelerator

GELUS = ("erf", "tanh")
POOLS = ("cls", "gap")
ATTENTIONS = attention_lib.IMPLEMENTATIONS
RESIDUALS = ("auto", *residuals.RESIDUALS)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def create(
  name: str,
  *,
  num_classes: int,
  norm: str = "LN",
  residual: str = "auto",
  residual_c: float | None = None,
  qk_norm: bool = False,
  sigma_reparam: bool = False,
  image_size: int = 224,
  dropout_rate: float = 0.1,
  stochastic_depth: float = 0.0,
  pool: str = "cls",
  gelu: str = "erf",
  attention: str = "auto",
  remat: bool = False,
  init: str = "torch",
  representation_size: int | None = None,
  fade: fade_lib.Schedule | None = None,
  dtype: str = "float32",
  **sizes: int | None,
) -> vit.VisionTransformer:
  """Returns a model of the table of sizes, as a flax.linen module.

  Args:
    name: a key of `variants.VARIANTS`, such as 'ViT-B_16'.
    num_classes: width of the head.
    norm: a key of `norms.NORMS`.
    residual: a key of `residuals.RESIDUALS`, or 'auto': `rescalevit` with
      Rescale, `plain` with all others.
    residual_c: c of the residual `rescalenet`; None: twice the encoder blocks.
    qk_norm: whether queries and keys are normalized: see `branches`.
    sigma_reparam: whether the linear layers of the blocks learn their largest
      singular value: see `sigma`.
    image_size: edge of the square images, in pixels.
    dropout_rate: after the embedding and twice in each MLP; attention has none.
    stochastic_depth: probability that an image skips a branch of the last block
      in training; see `vit.EncoderBlock`.
    pool: what the head sees: the class token ('cls') or the mean of the patches
      ('gap'). Parameters are the same.
    gelu: 'erf' as in RescaleViT or 'tanh' as in Google's code.
    attention: 'xla', 'cudnn', or 'auto': see `ops.attention.choose`.
    remat: whether training computes each block's inside a second time instead
      of keeping it in memory.
    init: 'torch' as in RescaleViT, 'google', 'unit': see `initializers`.
    representation_size: width of Google's `pre_logits` layer, or None for none.
    fade: when the norm Fade fades in training; None: never.
    dtype: of the computation: 'float32', 'bfloat16', 'float16', or 'auto': see
      `choose_dtype`. Parameters, norm statistics, softmax and logits are
      float32.
    **sizes: fields of `variants.Variant` that replace the table's; None keeps.

  Raises:
    UserError: an unknown name, or sizes that do not fit together.
  """
  for value, valid, what in (
    (name, variants.VARIANTS, "model_name"),
    (norm, norms.NORMS, "model.norm"),
    (residual, RESIDUALS, "model.residual"),
    (pool, POOLS, "model.pool"),
    (gelu, GELUS, "model.gelu"),
    (attention, ATTENTIONS, "model.attention"),
    (init, initializers.SCHEMES, "model.init"),
    (dtype, DTYPES, "dtype"),
  ):
    if value not in valid:
      raise errors.UserError(
        f"{what}: unknown {value!r}; {errors.nearest(str(value), valid)}"
      )
  fields = [f.name for f in dataclasses.fields(variants.Variant)]
  for key in sizes:
    if key not in fields:
      raise errors.UserError(
        f"models.create: unknown argument {key!r};"
        f" {errors.nearest(key, fields)}"
      )
  size = dataclasses.replace(
    variants.VARIANTS[name],
    **{k: v for k, v in sizes.items() if v is not None},
  )
  for key, value in dataclasses.asdict(size).items():
    if value < 1:
      raise errors.UserError(f"model.{key}: is {value}, but must be > 0")
  if residual_c is not None and residual_c <= 0:
    raise errors.UserError(
      f"model.residual_c: is {residual_c}, but must be > 0"
    )
  if image_size % size.patch_size:
    raise errors.UserError(
      f"image_size: {image_size} is not divisible by the patch size"
      f" {size.patch_size} of {name}"
    )
  if size.hidden_size % size.num_heads:
    raise errors.UserError(
      f"model.hidden_size: {size.hidden_size} is not divisible by the"
      f" {size.num_heads} heads"
    )
  if norm == "GN" and size.hidden_size % norms.GroupNorm.GROUPS:
    raise errors.UserError(
      f"model.hidden_size: {size.hidden_size} is not divisible by the"
      f" {norms.GroupNorm.GROUPS} groups of GN"
    )
  if residual == "auto":
    residual = norms.NORMS[norm].RESIDUAL
  if dtype == "auto":
    dtype = choose_dtype()
  head_dim = size.hidden_size // size.num_heads
  if attention == "auto":
    attention = attention_lib.choose(jnp.dtype(dtype), head_dim).implementation
  elif attention == "cudnn" and (
    problem := attention_lib.cudnn_problem(jnp.dtype(dtype), head_dim)
  ):
    raise errors.UserError(f"model.attention: {problem}; choose auto or xla")
  return vit.VisionTransformer(
    num_classes=num_classes,
    norm=norm,
    residual=residual,
    residual_c=residual_c,
    qk_norm=qk_norm,
    sigma_reparam=sigma_reparam,
    dropout_rate=dropout_rate,
    stochastic_depth=stochastic_depth,
    pool=pool,
    gelu=gelu,
    attention=attention,
    remat=remat,
    init_scheme=init,
    representation_size=representation_size,
    fade=fade,
    dtype=jnp.dtype(dtype),
    **dataclasses.asdict(size),
  )


def choose_dtype() -> str:
  """Return the dtype that 'auto' means here.

  float32 on a CPU; float16 on an NVIDIA GPU before Ampere (compute capability
  8.0), which has no bfloat16; else bfloat16.
  """
  if accelerator.platform() == "cpu":
    return "float32"
  has_no_bfloat16 = (0, 0) < accelerator.current().compute_capability < (8, 0)
  return "float16" if has_no_bfloat16 else "bfloat16"
