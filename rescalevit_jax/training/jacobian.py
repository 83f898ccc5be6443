"""The Jacobian of the residual stream with respect to earlier depths."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rescalevit_jax.models import vit


def norms(
  params: Any,
  batch_stats: Any,
  images: Float32[Array, "B S S 3"],
  seed: int | jax.Array,
  *,
  model: nn.Module,
) -> dict[str, jax.Array]:
  """Estimate the averaged partial Jacobian norm of the residual stream.

  With the stream x_l [N D] of an image after l of L blocks, before the final
  norm, in evaluation mode,

    |dx_L / dx_l|_F^2 / (N D),

  averaged over images (Doshi et al. 2023, arXiv:2111.12143; for transformers,
  Alekseev 2026, arXiv:2604.11890). It is the factor by which the squared
  gradient grows from the last block back to depth l. At depth L it is 1.

  |J^T v|^2 has the mean |J|_F^2 for a vector v of independent standard normal
  numbers. Each image has one v. Images are in [-1, 1].

  Returns:
    `jacobian` [L + 1], at the input of the first block and after each block.
  """
  config = dataclasses.replace(
    model.config, dtype="float32", attention="xla", remat=False
  )
  model = model.clone(config=config)

  def last_stream(shifts):
    streams = []

    def shift(method, args, kwargs, context):
      is_block = isinstance(context.module, vit.EncoderBlock)
      if not is_block or context.method_name != "__call__":
        return method(*args, **kwargs)
      x, *others = args
      x = method(x + shifts[len(streams)], *others, **kwargs)
      streams.append(x)
      return x

    with nn.intercept_methods(shift):
      model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=False,
        mutable=["intermediates"],  # The last block then returns all tokens.
      )
    return streams[-1]

  tokens = 1 + (config.image_size // config.patch_size) ** 2
  shape = (config.num_layers, len(images), tokens, config.hidden_size)
  stream, pull_back = jax.vjp(last_stream, jnp.zeros(shape))
  v = jax.random.normal(jax.random.key(seed), stream.shape)
  (gradients,) = pull_back(v)
  sizes = jnp.square(gradients).mean((1, 2, 3))
  return {"jacobian": jnp.append(sizes, 1.0)}
