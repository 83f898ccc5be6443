"""How a branch's output joins the residual stream: every way behind one name.

Branches are numbered 1 to 2L: attention and MLP of L blocks. To add a way,
write a class and enter it in `RESIDUALS`.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


class Residual(nn.Module):
  """The stream plus the branch.

  Attributes:
    features: channels D.
    branch: its number k, from 1; even ones are MLPs.
    num_blocks: encoder blocks L.
    c: of `RescaleNet`; None: 2L.
    dtype: of the output.
  """

  features: int
  branch: int
  num_blocks: int
  c: float | None = None
  dtype: Any = jnp.float32

  # The parameter is named SLOT_0/scale after attention and SLOT_2/scale after
  # the MLP, like the norms' before them; None: there is none.
  SLOT: ClassVar[str | None] = None

  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Joins the stream x [B, N, D] and a branch's output y [B, N, D]."""
    return x + y


class RescaleViT(Residual):
  """What RescaleViT coded: the MLP's residual is scaled, attention's is not.

  With k the number of the block of L and one learned scale a block,

    x = sqrt(k / (k + 1)) * x + scale * L^(-1/2) * MLP(x)
  """

  SLOT: ClassVar[str] = "Rescale"

  @nn.compact
  def __call__(self, x, y):
    if self.branch % 2:
      return x + y
    scale = self.param("scale", nn.initializers.ones, (1,))
    block = self.branch // 2
    skip = (block / (block + 1)) ** 0.5
    branch = scale * self.num_blocks**-0.5
    return _join(skip, x, branch, y, self.dtype)


class RescaleNet(Residual):
  """RescaleNet's, of every branch (Shao et al. 2020, NeurIPS).

    x = sqrt((k - 1 + c) / (k + c)) * x + scale * (k + c)^(-1/2) * branch(x)

  The squares of the factors sum to 1, so that the variance neither grows nor
  shrinks with depth. Scale is learned, one number a branch, from 1.
  """

  SLOT: ClassVar[str] = "RescaleNet"

  @nn.compact
  def __call__(self, x, y):
    scale = self.param("scale", nn.initializers.ones, (1,))
    c = 2 * self.num_blocks if self.c is None else self.c
    skip = ((self.branch - 1 + c) / (self.branch + c)) ** 0.5
    branch = scale * (self.branch + c) ** -0.5
    # As skip * x + branch * y, XLA on a CPU would compute the stream anew, from
    # all branches before, for each that reads it (a third of an evaluation's
    # time).
    change = (skip - 1) * x.astype(jnp.float32) + branch * y
    return _join(1.0, x, 1.0, change, self.dtype)


class SkipInit(Residual):
  """x + scale * branch(x), one learned scale a branch, from 0.

  De & Smith 2020 (NeurIPS, arXiv:2002.10444): the network starts as the
  identity.
  """

  SLOT: ClassVar[str] = "SkipInit"

  @nn.compact
  def __call__(self, x, y):
    scale = self.param("scale", nn.initializers.zeros, (1,))
    return _join(1.0, x, scale, y, self.dtype)


class LayerScale(Residual):
  """x + scale * branch(x), one learned scale a channel, from a small number.

  Touvron et al. 2021 (CaiT, arXiv:2103.17239), section 2: 0.1 for up to 18
  blocks, 1e-5 up to 24, 1e-6 beyond.
  """

  SLOT: ClassVar[str] = "LayerScale"

  @nn.compact
  def __call__(self, x, y):
    start = 0.1 if self.num_blocks <= 18 else 1e-5
    start = start if self.num_blocks <= 24 else 1e-6
    init = nn.initializers.constant(start)
    scale = self.param("scale", init, (self.features,))
    return _join(1.0, x, scale, y, self.dtype)


def _join(skip, x, branch, y, dtype):
  x = x.astype(jnp.float32)  # Or bfloat16 would round `skip`.
  return (skip * x + branch * y).astype(dtype)


RESIDUALS: dict[str, type[Residual]] = {
  "plain": Residual,
  "rescalevit": RescaleViT,
  "rescalenet": RescaleNet,
  "skipinit": SkipInit,
  "layerscale": LayerScale,
}
