"""The Vision Transformer: the whole forward pass, from images to logits.

Modules and parameters have the names of Google's published checkpoints: the
parameter tree, flattened with '/', is the checkpoint format.

Axes: B images, H by W pixels, N tokens (the class token first) of D channels,
M queries, h attention heads of d channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from rescalevit_jax.models import linear
from rescalevit_jax.models import norms
from rescalevit_jax.models import residuals
from rescalevit_jax.models import sigma
from rescalevit_jax.models.norms import rms_norm
from rescalevit_jax.models.ops import attention
from rescalevit_jax.models.ops import dropout
from rescalevit_jax.models.ops import gradients
from rescalevit_jax.models.vit_config import ViTConfig

Images = Float[Array, "B H W 3"]
Patches = Float[Array, "B N-1 D"]
Tokens = Float[Array, "B N D"]
ClassToken = Float[Array, "1 1 D"]
DropoutKey = UInt32[Array, " 2"] | None


class PatchEmbedding(nn.Module):
  """A linear map of each patch."""

  config: ViTConfig

  @nn.compact
  def __call__(self, images: Images) -> Patches:
    c, p = self.config, self.config.patch_size
    batch, height, width, channels = images.shape
    if height % p or width % p:
      raise ValueError(
        f"images: {height}x{width} pixels are not divisible into patches of"
        f" {p}x{p}; resize the images"
      )
    inputs = p * p * channels
    shape = (p, p, channels, c.hidden_size)
    kernel = self.param("kernel", c.scheme.patch_kernel, shape)
    bias = self.param("bias", c.scheme.patch_bias(inputs), (c.hidden_size,))
    # A convolution whose stride is its size is one matrix product.
    x = images.reshape(batch, height // p, p, width // p, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, inputs)
    kernel = kernel.reshape(inputs, -1).astype(c.dtype)
    return x.astype(c.dtype) @ kernel + bias.astype(c.dtype)


class PositionEmbedding(nn.Module):
  """Prepend the class token and add a learned vector to each token."""

  config: ViTConfig

  @nn.compact
  def __call__(self, patches: Patches, cls: ClassToken) -> Tokens:
    _, count, features = patches.shape
    shape = (1, count + 1, features)
    pos = self.param("pos_embedding", self.config.scheme.position, shape)
    pos = pos + jnp.pad(cls, ((0, 0), (0, count), (0, 0)))
    patches = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
    return gradients.add_to_batch(patches, pos[0].astype(patches.dtype))


class MultiHeadAttention(nn.Module):
  """Self-attention of the tokens x, with their first M tokens as queries.

  The attention probabilities are sown as `intermediates/.../attention`.

  With `qk_norm`, RMSNorms normalize each head's queries and keys. The heads
  share its scale, as in ViT-22B (Dehghani et al. 2023, arXiv:2302.05442,
  section 2: LayerNorm without bias and centering). `logit_cap` bounds the
  attention logits; see `attention.probabilities`.
  """

  config: ViTConfig

  @nn.compact
  def __call__(
    self, queries: Float[Array, "B M D"], x: Tokens, train: bool
  ) -> Float[Array, "B M D"]:
    c = self.config
    Linear = functools.partial(
      sigma.SigmaLinear if c.sigma_reparam else linear.Linear,
      kernel_init=c.scheme.attention_kernel,
      bias_init=c.scheme.attention_bias(c.hidden_size),
      dtype=c.dtype,
    )

    def project(name, x):
      heads = (c.num_heads, c.head_dim)
      return Linear(heads, bias_in_product=True, name=name)(x, train)

    values = x
    if queries is x:
      queries, x, values = gradients.fan_out(x)
    query = project("query", queries)
    key, value = project("key", x), project("value", values)
    if c.qk_norm:
      RMSNorm = functools.partial(
        rms_norm.RMSNorm, c.head_dim, c.dtype, c.norm_options("attention")
      )
      query = RMSNorm(name="query_norm")(query, train)
      key = RMSNorm(name="key_norm")(key, train)
    if self.is_mutable_collection("intermediates"):
      maps = attention.probabilities(query, key, c.logit_cap)
      self.sow("intermediates", "attention", maps)
    y = attention.attend(query, key, value, c.attention, c.logit_cap)
    return Linear(c.hidden_size, input_axes=2, name="out")(y, train)


class Mlp(nn.Module):
  """Two linear layers with a GELU between them."""

  config: ViTConfig
  dropout_index: int  # Of the first of the two dropouts.

  @nn.compact
  def __call__(self, x: Tokens, train: bool, key: DropoutKey) -> Tokens:
    c = self.config
    Linear = functools.partial(
      sigma.SigmaLinear if c.sigma_reparam else linear.Linear,
      kernel_init=c.scheme.mlp_kernel,
      bias_init=c.scheme.mlp_bias,
      dtype=c.dtype,
    )
    x = Linear(c.mlp_dim, name="Dense_0")(x, train)
    Norm = norms.NORMS[c.norm]
    if Norm.IN_MLP:
      options = c.norm_options("mlp")
      x = Norm(c.mlp_dim, c.dtype, options, name=Norm.IN_MLP)(x, train)
    x = gelu(x, c.gelu)
    x = dropout.drop(x, key, self.dropout_index, c.dropout_rate)
    x = Linear(c.hidden_size, name="Dense_1")(x, train)
    return dropout.drop(x, key, self.dropout_index + 1, c.dropout_rate)


def gelu(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
  """Return the GELU (Hendrycks & Gimpel 2016), computed in float32.

  The kind is 'erf', or 'tanh' for Google's approximation.
  """
  y = x.astype(jnp.float32)
  if kind == "tanh":
    y = nn.gelu(y)
  else:  # flax's GELU uses XLA's erfc, which is slower than erf on a CPU.
    y *= 0.5 * (1 + jax.lax.erf(y * 2**-0.5))
  return y.astype(x.dtype)


class EncoderBlock(nn.Module):
  """Attention, then MLP, each added to the residual stream.

  With a branch f and a norm N, `norm_position` selects

    pre:  x + f(N(x))
    post: N(x + f(x)), the original Transformer (arXiv:1706.03762); then there
      is no final norm
    peri: x + N'(f(N(x))), Peri-LN (Kim et al. 2025, arXiv:2502.02732)

  With `norm_depth_scaling` N(x) of block l is multiplied by l^(-1/2) (LayerNorm
  Scaling; Sun et al. 2025, arXiv:2502.05795).

  In training an image skips a branch of block l of L with the probability
  l/L * stochastic_depth (Huang et al. 2016, arXiv:1603.09382, equation 4).

  If the head sees only the class token, the last block computes the other
  tokens up to their keys and values and returns one token. This requires a norm
  that maps each token independently of the others.
  """

  config: ViTConfig
  block: int  # From 1.

  @nn.compact
  def __call__(self, x: Tokens, train: bool, key: DropoutKey) -> Tokens:
    c = self.config
    attend = MultiHeadAttention(c, name="MultiHeadDotProductAttention_1")
    norm, residual = self._norm_and_residual(branch=2 * self.block - 1)
    y = self._before(norm, x, train)
    queries = y
    is_last = c.pool == "cls" and self.block == c.num_layers
    observed = self.is_mutable_collection("intermediates")
    if is_last and norm.is_per_token(train) and not observed:
      x, queries = x[:, :1], y[:, :1]
    x = self._add(norm, residual, x, attend(queries, y, train), train, key)

    mlp = Mlp(c, dropout_index=4 * self.block + 2, name="MlpBlock_3")
    norm, residual = self._norm_and_residual(branch=2 * self.block)
    y = mlp(self._before(norm, x, train), train, key)
    return self._add(norm, residual, x, y, train, key)

  def _before(self, norm, x, train):
    """Return the input of a branch."""
    if self.config.norm_position == "post":
      return x
    y = norm(x, train)
    if self.config.norm_depth_scaling:
      y = (self.block**-0.5 * y.astype(jnp.float32)).astype(y.dtype)
    return y

  def _add(self, norm, residual, x, y, train, key):
    """Return the residual stream x after a branch whose output is y."""
    c, index = self.config, residual.branch - 1
    if c.norm_position == "peri":
      y = _norm(c, index, f"Peri{norm.name}")(y, train)
    rate = c.stochastic_depth * self.block / c.num_layers
    y = dropout.drop(y, key, 4 * self.block + index % 2, rate, whole=True)
    x = residual(x, y)
    return norm(x, train) if c.norm_position == "post" else x

  def _norm_and_residual(self, branch):
    c, number = self.config, 0 if branch % 2 else 2
    Norm, Residual = norms.NORMS[c.norm], residuals.RESIDUALS[c.residual]
    norm = _norm(c, branch - 1, c.norm_slot(number))
    shared = Residual.SLOT == Norm.SLOT  # One module, as in RescaleViT.
    unnamed = shared or Residual.SLOT is None
    residual = Residual(
      c.hidden_size,
      branch=branch,
      num_blocks=c.num_layers,
      c=c.residual_c,
      layerscale_init=c.layerscale_init,
      dtype=c.dtype,
      name=None if unnamed else f"{Residual.SLOT}_{number}",
    )
    if shared:
      nn.share_scope(residual, norm)
    return norm, residual


def _norm(config, site, name):
  """Return the norm at a site: two in each block, then the final norm.

  With `norm_position=post` the last block's second norm is the final one.
  """
  Norm, fields = norms.NORMS[config.norm], {}
  final = 2 * config.num_layers - (config.norm_position == "post")
  kind = "final" if site == final else ("attention", "mlp")[site % 2]
  if config.norm_schedule is not None:
    fields["schedule"] = config.norm_schedule.at_site(site, final + 1)
  options = config.norm_options(kind)
  return Norm(config.hidden_size, config.dtype, options, name=name, **fields)


class Encoder(nn.Module):
  """Class token and positions, the blocks, the final norm.

  The norm after the embedding is optional, as in Peri-LN (arXiv:2502.02732).
  """

  config: ViTConfig

  @nn.compact
  def __call__(
    self, patches: Patches, cls: ClassToken, train: bool, key: DropoutKey
  ) -> Tokens:
    c = self.config
    x = PositionEmbedding(c, name="posembed_input")(patches, cls)
    if c.embedding_norm:
      x = _norm(c, 0, "embedding_norm")(x, train)
    x = dropout.drop(x, key, 0, c.dropout_rate)
    Block = EncoderBlock
    if c.remat:
      Block = nn.remat(EncoderBlock, static_argnums=2)  # `train`.
    for i in range(c.num_layers):
      x = Block(c, block=i + 1, name=f"encoderblock_{i}")(x, train, key)
    if norms.NORMS[c.norm].FINAL and c.norm_position != "post":
      x = _norm(c, 2 * c.num_layers, "encoder_norm")(x, train)
    return x


class VisionTransformer(nn.Module):
  """A Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

  config: ViTConfig

  @nn.compact
  def __call__(
    self, images: Images, train: bool = False
  ) -> Float[Array, "B classes"]:
    """Return the float32 logits of images in [-1, 1].

    In training, dropout is on, which needs the rng `dropout`, and norms use
    batch statistics and update the collection `batch_stats`.
    """
    c = self.config
    x = PatchEmbedding(c, name="embedding")(images)
    cls = self.param("cls", c.scheme.cls, (1, 1, c.hidden_size))
    key = None
    if train and (c.dropout_rate or c.stochastic_depth):
      key = dropout.step_key(self.make_rng("dropout"))
    x = Encoder(c, name="Transformer")(x, cls, train, key)
    if c.pool == "cls":
      x = x[:, 0].astype(jnp.float32)
    else:
      x = x[:, 1:].astype(jnp.float32).mean(axis=1)
    if c.representation_size is not None:
      x = nn.tanh(nn.Dense(c.representation_size, name="pre_logits")(x))
    return nn.Dense(
      c.num_classes,
      kernel_init=c.scheme.head_kernel,
      bias_init=c.scheme.head_bias(x.shape[-1]),
      name="head",
    )(x)
