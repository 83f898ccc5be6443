"""The two branches of an encoder block: attention and MLP.

Shapes: B images, N tokens, D channels, h heads of D/h channels.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rescalevit_jax.models import initializers
from rescalevit_jax.models import linear
from rescalevit_jax.models import norms
from rescalevit_jax.models import sigma
from rescalevit_jax.models.ops import attention
from rescalevit_jax.models.ops import dropout
from rescalevit_jax.models.ops import gradients


class MultiHeadAttention(nn.Module):
  """Self-attention of the tokens x: queries [B, M, D] -> [B, M, D].

  `queries` may hold fewer tokens than x.

  The probabilities [B, h, M, N], float32, are sown as
  `intermediates/.../attention`.

  With `qk_norm`, each head's queries and keys pass through an RMSNorm of their
  own, whose scale [D/h] the heads share, as in ViT-22B (Dehghani et al. 2023,
  arXiv:2302.05442, section 2: LayerNorm without bias and centering).
  """

  num_heads: int
  qk_norm: bool
  sigma_reparam: bool
  implementation: str
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, queries, x, train):
    features = x.shape[-1]
    head_dim = features // self.num_heads
    Linear = sigma.SigmaLinear if self.sigma_reparam else linear.Linear

    def project(name, x):
      return Linear(
        (self.num_heads, head_dim),
        kernel_init=self.scheme.attention_kernel,
        bias_init=self.scheme.attention_bias(features),
        dtype=self.dtype,
        bias_in_product=True,
        name=name,
      )(x, train)

    if queries is x:
      queries, x, values = gradients.fan_out(x)
    else:
      values = x
    query = project("query", queries)
    key, value = project("key", x), project("value", values)
    if self.qk_norm:
      normalize = functools.partial(norms.RMSNorm, head_dim, self.dtype)
      query = normalize(name="query_norm")(query, train)
      key = normalize(name="key_norm")(key, train)
    if self.is_mutable_collection("intermediates"):
      maps = attention.probabilities(query, key)
      self.sow("intermediates", "attention", maps)
    y = attention.attend(query, key, value, self.implementation)
    return Linear(
      features,
      input_axes=2,
      kernel_init=self.scheme.attention_kernel,
      bias_init=self.scheme.attention_bias(features),
      dtype=self.dtype,
      name="out",
    )(y, train)


class Mlp(nn.Module):
  """Two linear layers with a GELU between: [B, N, D] -> [B, N, D].

  The dropouts after the GELU and after the second layer are those of `site` and
  the next one.
  """

  mlp_dim: int
  norm: str
  sigma_reparam: bool
  dropout_rate: float
  site: int
  gelu: str
  scheme: initializers.Scheme
  dtype: Any

  @nn.compact
  def __call__(self, x, train, key):
    Linear = sigma.SigmaLinear if self.sigma_reparam else linear.Linear

    def dense(features, name):
      return Linear(
        features,
        kernel_init=self.scheme.mlp_kernel,
        bias_init=self.scheme.mlp_bias,
        dtype=self.dtype,
        name=name,
      )

    features = x.shape[-1]
    x = dense(self.mlp_dim, "Dense_0")(x, train)
    Norm = norms.NORMS[self.norm]
    if Norm.IN_MLP:
      x = Norm(self.mlp_dim, self.dtype, name=norms.IN_MLP)(x, train)
    x = gelu(x, self.gelu)
    x = dropout.drop(x, key, self.site, self.dropout_rate)
    x = dense(features, "Dense_1")(x, train)
    return dropout.drop(x, key, self.site + 1, self.dropout_rate)


def gelu(x: jax.Array, kind: str) -> jax.Array:
  """Return x Phi(x) (Hendrycks & Gimpel 2016), computed in float32.

  Args:
    x: of any shape.
    kind: 'erf', or 'tanh' for an approximation. Through erf: XLA's erfc, which
      flax's GELU takes, is slower on a CPU.
  """
  y = x.astype(jnp.float32)
  if kind == "tanh":
    y = nn.gelu(y)
  else:
    y *= 0.5 * (1 + jax.lax.erf(y * 2**-0.5))
  return y.astype(x.dtype)
