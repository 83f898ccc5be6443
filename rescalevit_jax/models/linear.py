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
  """

  features: int | tuple[int, ...]  # The output's last axis, or its last two.
  input_axes: int = 1  # Number of contracted axes.
  kernel_init: Any = nn.initializers.lecun_normal()  # Of [inputs, outputs].
  bias_init: Any = nn.initializers.zeros
  dtype: Any = jnp.float32
  # True: cuBLAS adds the bias, in `dtype`, which is fastest if the result is an
  # operand of another product. False: the kernel that reads the result adds the
  # bias, without another array in memory.
  bias_in_product: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch inputs"], train: bool = False
  ) -> Float[Array, "*batch outputs"]:
    """Return x kernel + bias."""
    outputs = self.features
    if isinstance(outputs, int):
      outputs = (outputs,)
    first = x.ndim - self.input_axes
    batch, contracted = x.shape[:first], x.shape[first:]
    inputs = math.prod(contracted)

    def kernel_init(key, shape):
      matrix = (inputs, math.prod(outputs))
      return self.kernel_init(key, matrix).reshape(shape)

    shape = (*contracted, *outputs)
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
