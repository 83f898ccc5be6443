"""VisionTransformer and its blocks.

Modules and parameters have the names of Google's published checkpoints, so
that the parameter tree, flattened with '/', is the checkpoint format.

Shapes: B images, H by W pixels, N tokens (the class token first), D channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import branches
from rescalevit_jax.models import fade as fade_lib
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models.ops import dropout
from rescalevit_jax.models.ops import gradients


class PatchEmbedding(nn.Module):
  """Linear map of each patch: [B, H, W, 3] -> [B, H/P * W/P, D]."""

  patch_size: int
  hidden_size: int
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, images):
    batch, height, width, channels = images.shape
    p = self.patch_size
    if height % p or width % p:
      raise ValueError(
        f"images of {height}x{width} pixels do not divide into patches of"
        f" {p}x{p}"
      )
    shape = (p, p, channels, self.hidden_size)
    kernel = self.param("kernel", self.scheme.patch_kernel, shape)
    bias = self.param(
      "bias", self.scheme.patch_bias(p * p * channels), (self.hidden_size,)
    )
    # A convolution whose stride is its size is one matrix product.
    patches = images.reshape(
      batch, height // p, p, width // p, p, channels
    ).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, -1, p * p * channels).astype(self.dtype)
    kernel = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
    return patches @ kernel + bias.astype(self.dtype)


class PositionEmbedding(nn.Module):
  """Prepends the class token, then adds a learned vector to each token.

  Maps patches [B, N - 1, D] and the class token [1, 1, D] to [B, N, D].
  """

  scheme: initializers.Scheme

  @nn.compact
  def __call__(self, patches, cls):
    _, count, features = patches.shape
    shape = (1, count + 1, features)
    pos = self.param("pos_embedding", self.scheme.position, shape)
    pos = pos + jnp.pad(cls, ((0, 0), (0, count), (0, 0)))
    patches = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
    return gradients.add_to_batch(patches, pos[0].astype(patches.dtype))


class EncoderBlock(nn.Module):
  """Pre-norm attention, then pre-norm MLP: [B, N, D] -> [B, N, D].

  In training an image skips a branch of block l of L with the probability
  l/L * stochastic_depth (Huang et al. 2016, arXiv:1603.09382, equation 4).

  With `only_cls` the caller needs the class token alone. If the norm maps each
  token by itself, the others are computed only up to their keys and values, and
  the result is [B, 1, D].
  """

  block: int
  num_blocks: int
  num_heads: int
  mlp_dim: int
  norm: str
  residual: str
  residual_c: float | None
  qk_norm: bool
  sigma_reparam: bool
  dropout_rate: float
  stochastic_depth: float
  gelu: str
  attention: str
  scheme: initializers.Scheme
  dtype: Any
  fade: fade_lib.Schedule | None = None
  only_cls: bool = False

  @nn.compact
  def __call__(self, x, train, key):
    skip_rate = self.stochastic_depth * self.block / self.num_blocks

    def drop(y, number):
      site = 4 * self.block + number
      return dropout.drop(y, key, site, skip_rate, whole=True)

    attention = branches.MultiHeadAttention(
      self.num_heads,
      self.qk_norm,
      self.sigma_reparam,
      self.attention,
      self.scheme,
      self.dtype,
      name="MultiHeadDotProductAttention_1",
    )
    norm, join = self._place(0, x.shape[-1])
    y = norm(x, train)
    queries = y
    observed = self.is_mutable_collection("intermediates")
    if self.only_cls and norm.is_per_token(train) and not observed:
      x, queries = x[:, :1], y[:, :1]
    x = join(x, drop(attention(queries, y, train), 0))

    mlp = branches.Mlp(
      self.mlp_dim,
      self.norm,
      self.sigma_reparam,
      self.dropout_rate,
      4 * self.block + 2,
      self.gelu,
      self.scheme,
      self.dtype,
      name="MlpBlock_3",
    )
    norm, join = self._place(2, x.shape[-1])
    return join(x, drop(mlp(norm(x, train), train, key), 1))

  def _place(self, number, features):
    """Returns the norm before a branch and the residual after it."""
    Norm = norms.NORMS[self.norm]
    Residual = residuals.RESIDUALS[self.residual]
    shared = Residual.SLOT == Norm.SLOT  # RescaleViT's names: one module.
    unnamed = shared or Residual.SLOT is None
    branch = 2 * self.block - (number == 0)
    ramp = _ramp(self.fade, branch - 1, self.num_blocks)
    norm = Norm(features, self.dtype, ramp, name=f"{Norm.SLOT}_{number}")
    join = Residual(
      features,
      branch=branch,
      num_blocks=self.num_blocks,
      c=self.residual_c,
      dtype=self.dtype,
      name=None if unnamed else f"{Residual.SLOT}_{number}",
    )
    if shared:
      nn.share_scope(join, norm)
    return norm, join


class Encoder(nn.Module):
  """Class token and positions, the blocks, the final norm.

  Maps patches [B, N - 1, D] and the class token [1, 1, D] to [B, N, D], or to
  [B, 1, D] if only the class token is needed.
  """

  num_layers: int
  num_heads: int
  mlp_dim: int
  norm: str
  residual: str
  residual_c: float | None
  qk_norm: bool
  sigma_reparam: bool
  dropout_rate: float
  stochastic_depth: float
  gelu: str
  attention: str
  remat: bool
  pool: str
  scheme: initializers.Scheme
  dtype: Any
  fade: fade_lib.Schedule | None = None

  @nn.compact
  def __call__(self, patches, cls, train, key):
    x = PositionEmbedding(self.scheme, name="posembed_input")(patches, cls)
    x = dropout.drop(x, key, 0, self.dropout_rate)
    Block = EncoderBlock
    if self.remat:
      Block = nn.remat(EncoderBlock, static_argnums=2)  # `train`.
    for i in range(self.num_layers):
      x = Block(
        block=i + 1,
        num_blocks=self.num_layers,
        num_heads=self.num_heads,
        mlp_dim=self.mlp_dim,
        norm=self.norm,
        residual=self.residual,
        residual_c=self.residual_c,
        qk_norm=self.qk_norm,
        sigma_reparam=self.sigma_reparam,
        dropout_rate=self.dropout_rate,
        stochastic_depth=self.stochastic_depth,
        gelu=self.gelu,
        attention=self.attention,
        scheme=self.scheme,
        dtype=self.dtype,
        fade=self.fade,
        only_cls=self.pool == "cls" and i == self.num_layers - 1,
        name=f"encoderblock_{i}",
      )(x, train, key)
    Norm = norms.NORMS[self.norm]
    if Norm.FINAL:
      ramp = _ramp(self.fade, 2 * self.num_layers, self.num_layers)
      x = Norm(x.shape[-1], self.dtype, ramp, name="encoder_norm")(x, train)
    return x


def _ramp(schedule, place, num_blocks):
  return schedule and schedule.ramp(place, 2 * num_blocks + 1)


class VisionTransformer(nn.Module):
  """A Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

  Made by `models.create`, whose docstring explains the attributes.
  """

  num_classes: int
  patch_size: int
  hidden_size: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  norm: str = "LN"
  residual: str = "plain"
  residual_c: float | None = None
  qk_norm: bool = False
  sigma_reparam: bool = False
  dropout_rate: float = 0.1
  stochastic_depth: float = 0.0
  pool: str = "cls"
  gelu: str = "erf"
  attention: str = "xla"
  remat: bool = False
  init_scheme: str = "torch"
  representation_size: int | None = None
  fade: fade_lib.Schedule | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, 3] float32 in [-1, 1].
      train: whether dropout is on (needs the rng `dropout`) and statistics are
        those of the batch (BN, BN2, Rescale, Fade and `sigma_reparam` change
        `batch_stats`).

    Returns:
      Logits [B, num_classes], float32.
    """
    scheme = initializers.SCHEMES[self.init_scheme]
    x = PatchEmbedding(
      self.patch_size, self.hidden_size, scheme, self.dtype, name="embedding"
    )(images)
    cls = self.param("cls", scheme.cls, (1, 1, self.hidden_size))
    key = None
    if train and (self.dropout_rate or self.stochastic_depth):
      key = dropout.step_key(self.make_rng("dropout"))
    x = Encoder(
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      norm=self.norm,
      residual=self.residual,
      residual_c=self.residual_c,
      qk_norm=self.qk_norm,
      sigma_reparam=self.sigma_reparam,
      dropout_rate=self.dropout_rate,
      stochastic_depth=self.stochastic_depth,
      gelu=self.gelu,
      attention=self.attention,
      remat=self.remat,
      pool=self.pool,
      scheme=scheme,
      dtype=self.dtype,
      fade=self.fade,
      name="Transformer",
    )(x, cls, train, key)
    if self.pool == "cls":
      x = x[:, 0].astype(jnp.float32)
    else:
      x = x[:, 1:].astype(jnp.float32).mean(axis=1)
    if self.representation_size is not None:
      x = nn.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
    return nn.Dense(
      self.num_classes,
      kernel_init=scheme.head_kernel,
      bias_init=scheme.head_bias(x.shape[-1]),
      name="head",
    )(x)
