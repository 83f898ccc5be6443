"""Linear layers, computed as one matrix product over flat arrays."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rescalevit_jax.models.ops import gradients


class Linear(nn.Module):
  """A linear layer over the last axis, or the last two: y = x kernel + bias.

  It has the parameters of `flax.linen.DenseGeneral`, and flattens the arrays
  before the product. Otherwise a bias of shape [h, d] is broadcast to a whole
  activation in memory, and XLA transposes the activations for the kernel's
  gradient.

  Attributes:
    features: size of the output's last axis, or of its last two axes.
    input_axes: number of contracted axes of the input.
    kernel_init: initializer of the kernel as a matrix [inputs, outputs].
    bias_init: initializer of the bias.
    dtype: of the computation.
    bias_in_product: whether cuBLAS adds the bias, in `dtype`. This is fastest
      if the result is the operand of another product. Otherwise the kernel that
      reads the result adds the bias without another array in memory.
  """

  features: int | tuple[int, ...]
  input_axes: int = 1
  kernel_init: Any = nn.initializers.lecun_normal()
  bias_init: Any = nn.initializers.zeros
  dtype: Any = jnp.float32
  bias_in_product: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch inputs"], train: bool = False
  ) -> Float[Array, "*batch outputs"]:
    """Return x kernel + bias."""
    outputs = self.features
    if isinstance(outputs, int):
      outputs = (outputs,)
    *batch, inputs = (
      *x.shape[: x.ndim - self.input_axes],
      math.prod(x.shape[x.ndim - self.input_axes :]),
    )

    def kernel_init(key, shape):
      matrix = (inputs, math.prod(outputs))
      return self.kernel_init(key, matrix).reshape(shape)

    shape = (*x.shape[x.ndim - self.input_axes :], *outputs)
    kernel = self.param("kernel", kernel_init, shape).reshape(inputs, -1)
    bias = self.param("bias", self.bias_init, outputs).reshape(-1)
    kernel = self.reparametrize(kernel, train)
    y = x.reshape(-1, inputs).astype(self.dtype) @ kernel.astype(self.dtype)
    if self.bias_in_product:
      y = gradients.add_bias(y, bias)
    else:
      y = (y.astype(jnp.float32) + bias).astype(self.dtype)
    return y.reshape(*batch, *outputs)

  def reparametrize(
    self, kernel: Float[Array, "inputs outputs"], train: bool
  ) -> Float[Array, "inputs outputs"]:
    """Return the matrix to multiply by."""
    del train
    return kernel
