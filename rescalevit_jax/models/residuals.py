"""Every residual by name: functions that add a branch to the residual stream.

Branches are numbered 1 to 2L: attention and MLP of L blocks. To add a residual,
write a class and add it to `RESIDUALS`.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Residual(nn.Module):
  """The residual stream plus the branch."""

  features: int  # Number of channels D.
  branch: int  # Number k of the branch, from 1; even branches are MLPs.
  num_blocks: int  # Number of encoder blocks L.
  c: float | None = None  # Of `RescaleNet`; None: 2L.
  layerscale_init: float | None = None  # Of `LayerScale`; None: by depth.
  dtype: Any = jnp.float32  # Of the output.

  # The parameter is named SLOT_0/scale after attention and SLOT_2/scale after
  # the MLP, like the preceding norm's; None: no parameter.
  SLOT: ClassVar[str | None] = None

  def __call__(
    self, x: Float[Array, "B N D"], y: Float[Array, "B N D"]
  ) -> Float[Array, "B N D"]:
    """Add a branch's output y to the residual stream x."""
    return x + y


class RescaleViT(Residual):
  """RescaleViT's residual, which scales the MLP's branch and not attention's.

  With k the number of the block of L and one learned scale per block,

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
  """RescaleNet's residual, which scales every branch.

  Shao et al. 2020, NeurIPS:

    x = sqrt((k - 1 + c) / (k + c)) * x + scale * (k + c)^(-1/2) * branch(x)

  The squares of the factors sum to 1, which keeps the variance constant over
  depth. Each branch learns one scale, which starts at 1.
  """

  SLOT: ClassVar[str] = "RescaleNet"

  @nn.compact
  def __call__(self, x, y):
    scale = self.param("scale", nn.initializers.ones, (1,))
    c = 2 * self.num_blocks if self.c is None else self.c
    skip = ((self.branch - 1 + c) / (self.branch + c)) ** 0.5
    branch = scale * (self.branch + c) ** -0.5
    # With skip * x + branch * y, XLA on a CPU recomputes the stream from all
    # previous branches at each use (a third of an evaluation's time).
    change = (skip - 1) * x.astype(jnp.float32) + branch * y
    return _join(1.0, x, 1.0, change, self.dtype)


class SkipInit(Residual):
  """x + scale * branch(x), with one learned scale per branch that starts at 0.

  De & Smith 2020 (NeurIPS, arXiv:2002.10444): the network starts as the
  identity.
  """

  SLOT: ClassVar[str] = "SkipInit"

  @nn.compact
  def __call__(self, x, y):
    scale = self.param("scale", nn.initializers.zeros, (1,))
    return _join(1.0, x, scale, y, self.dtype)


class LayerScale(Residual):
  """x + scale * branch(x), with one small learned scale per channel.

  Touvron et al. 2021 (CaiT, arXiv:2103.17239), section 2: it starts at 0.1 for
  up to 18 blocks, 1e-5 for up to 24, and 1e-6 for more, unless
  `layerscale_init` is set.
  """

  SLOT: ClassVar[str] = "LayerScale"

  @nn.compact
  def __call__(self, x, y):
    init = nn.initializers.constant(self.start())
    scale = self.param("scale", init, (self.features,))
    return _join(1.0, x, scale, y, self.dtype)

  def start(self):
    """Return the initial scale."""
    if self.layerscale_init is not None:
      return self.layerscale_init
    start = 0.1 if self.num_blocks <= 18 else 1e-5
    return start if self.num_blocks <= 24 else 1e-6


class Weighted(LayerScale):
  """LayerScale that starts at 1 / L, LipsFormer's weighted residual.

  Qi et al. 2023 (ICLR, arXiv:2304.09856), as in their code.
  """

  SLOT: ClassVar[str] = "Weighted"

  def start(self):
    return 1 / self.num_blocks


class Convex(Residual):
  """(1 - 1 / 2L) * x + 1 / 2L * branch(x), without parameters.

  Newhouse et al. 2025 (arXiv:2507.13338), and code: if every branch is
  1-Lipschitz, so is the encoder. `optimizers.cap_singular_values` bounds the
  branches.
  """

  def __call__(self, x, y):
    weight = 1 / (2 * self.num_blocks)
    return _join(1 - weight, x, jnp.float32(weight), y, self.dtype)


def _join(skip, x, branch, y, dtype):
  x = x.astype(jnp.float32)  # Otherwise bfloat16 rounds `skip`.
  return (skip * x + branch * y).astype(dtype)


RESIDUALS: dict[str, type[Residual]] = {
  "plain": Residual,
  "rescalevit": RescaleViT,
  "rescalenet": RescaleNet,
  "skipinit": SkipInit,
  "layerscale": LayerScale,
  "weighted": Weighted,
  "convex": Convex,
}
