"""VisionTransformer and its blocks.

Modules and parameters have the names of Google's published checkpoints, so
that the parameter tree, flattened with '/', is the checkpoint format.

Shapes: B images, H by W pixels, N tokens (the class token first), D channels,
h heads of D/h channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import attention
from rescalevit_jax.models import dropout
from rescalevit_jax.models import initializers
from rescalevit_jax.models import norms


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
  """Adds a learned vector to each token: [B, N, D] -> [B, N, D]."""

  scheme: initializers.Scheme

  @nn.compact
  def __call__(self, x):
    shape = (1, *x.shape[1:])
    pos = self.param("pos_embedding", self.scheme.position, shape)
    return x + pos.astype(x.dtype)


class MultiHeadAttention(nn.Module):
  """Self-attention: [B, N, D] -> [B, N, D].

  The probabilities [B, h, N, N], float32, are sown as
  `intermediates/.../attention`.
  """

  num_heads: int
  implementation: str
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, x):
    features = x.shape[-1]
    head_dim = features // self.num_heads

    def project(name):
      return nn.DenseGeneral(
        (self.num_heads, head_dim),
        kernel_init=self.scheme.attention_kernel,
        bias_init=self.scheme.attention_bias(features),
        dtype=self.dtype,
        name=name,
      )(x)

    query, key, value = project("query"), project("key"), project("value")
    if self.is_mutable_collection("intermediates"):
      maps = attention.probabilities(query, key)
      self.sow("intermediates", "attention", maps)
    y = attention.attend(query, key, value, self.implementation)
    return nn.DenseGeneral(
      features,
      axis=(-2, -1),
      kernel_init=self.scheme.attention_kernel,
      bias_init=self.scheme.attention_bias(features),
      dtype=self.dtype,
      name="out",
    )(y)


class Mlp(nn.Module):
  """Two linear layers with a GELU between: [B, N, D] -> [B, N, D]."""

  mlp_dim: int
  dropout_rate: float
  gelu: str
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, x, train):
    def dense(features, name):
      return nn.Dense(
        features,
        kernel_init=self.scheme.mlp_kernel,
        bias_init=self.scheme.mlp_bias,
        dtype=self.dtype,
        name=name,
      )

    features = x.shape[-1]
    x = dense(self.mlp_dim, "Dense_0")(x)
    x = nn.gelu(x) if self.gelu == "tanh" else gelu_erf(x)
    x = dropout.Dropout(self.dropout_rate)(x, train)
    x = dense(features, "Dense_1")(x)
    return dropout.Dropout(self.dropout_rate)(x, train)


def gelu_erf(x: jax.Array) -> jax.Array:
  """GELU, x Phi(x) (Hendrycks & Gimpel 2016), computed in float32.

  Through erf: XLA's erfc, which flax's GELU takes, is slower on a CPU.
  """
  y = x.astype(jnp.float32)
  y *= 0.5 * (1 + jax.lax.erf(y * 2**-0.5))
  return y.astype(x.dtype)


class EncoderBlock(nn.Module):
  """Pre-norm attention, then pre-norm MLP: [B, N, D] -> [B, N, D]."""

  block: int
  num_blocks: int
  num_heads: int
  mlp_dim: int
  norm: str
  dropout_rate: float
  gelu: str
  attention: str
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, x, train):
    Norm = norms.NORMS[self.norm]

    def norm(number, before_mlp):
      return Norm(
        features=x.shape[-1],
        block=self.block,
        num_blocks=self.num_blocks,
        before_mlp=before_mlp,
        dtype=self.dtype,
        name=f"{Norm.SLOT}_{number}",
      )

    before_attention = norm(0, before_mlp=False)
    self_attention = MultiHeadAttention(
      self.num_heads,
      self.attention,
      self.scheme,
      self.dtype,
      name="MultiHeadDotProductAttention_1",
    )
    x = before_attention.residual(x, self_attention(before_attention(x, train)))

    before_mlp = norm(2, before_mlp=True)
    mlp = Mlp(
      self.mlp_dim,
      self.dropout_rate,
      self.gelu,
      self.scheme,
      self.dtype,
      name="MlpBlock_3",
    )
    return before_mlp.residual(x, mlp(before_mlp(x, train), train))


class Encoder(nn.Module):
  """Position embedding, the blocks, the final norm: [B, N, D] -> [B, N, D]."""

  num_layers: int
  num_heads: int
  mlp_dim: int
  norm: str
  dropout_rate: float
  gelu: str
  attention: str
  remat: bool
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, x, train):
    x = PositionEmbedding(self.scheme, name="posembed_input")(x)
    x = dropout.Dropout(self.dropout_rate)(x, train)
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
        dropout_rate=self.dropout_rate,
        gelu=self.gelu,
        attention=self.attention,
        scheme=self.scheme,
        dtype=self.dtype,
        name=f"encoderblock_{i}",
      )(x, train)
    Norm = norms.NORMS[self.norm]
    if Norm.FINAL:
      x = Norm(
        features=x.shape[-1],
        block=self.num_layers + 1,
        num_blocks=self.num_layers,
        dtype=self.dtype,
        name="encoder_norm",
      )(x, train)
    return x


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
  dropout_rate: float = 0.1
  gelu: str = "erf"
  attention: str = "xla"
  remat: bool = False
  init_scheme: str = "torch"
  representation_size: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, 3] float32 in [-1, 1].
      train: whether dropout is on (needs the rng `dropout`) and statistics are
        those of the batch (BN and Rescale change `batch_stats`).

    Returns:
      Logits [B, num_classes], float32.
    """
    scheme = initializers.SCHEMES[self.init_scheme]
    x = PatchEmbedding(
      self.patch_size, self.hidden_size, scheme, self.dtype, name="embedding"
    )(images)
    cls = self.param(
      "cls", nn.initializers.zeros, (1, 1, self.hidden_size)
    ).astype(self.dtype)
    x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
    x = Encoder(
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      norm=self.norm,
      dropout_rate=self.dropout_rate,
      gelu=self.gelu,
      attention=self.attention,
      remat=self.remat,
      scheme=scheme,
      dtype=self.dtype,
      name="Transformer",
    )(x, train)
    x = x[:, 0].astype(jnp.float32)
    if self.representation_size is not None:
      x = nn.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
    return nn.Dense(
      self.num_classes,
      kernel_init=scheme.head_kernel,
      bias_init=scheme.head_bias(x.shape[-1]),
      name="head",
    )(x)
