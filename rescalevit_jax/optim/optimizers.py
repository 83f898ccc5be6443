"""The optimizers: SGD, AdamW and Muon, with clipping and weight decay.

The defaults, SGD with clipping by global norm, are RescaleViT's.
"""

import math
from typing import Any

import jax
import optax

from rescalevit_jax.optim import clipping
from rescalevit_jax.optim import kernels

OPTIMIZERS = ("sgd", "adamw", "muon")


def create(
  name: str,
  lr_schedule: optax.Schedule,
  *,
  momentum: float,
  adam_b2: float,
  weight_decay: float,
  grad_norm_clip: float,
  agc: float,
  scalar_lr_mult: float,
) -> optax.GradientTransformation:
  """Return an optimizer by its name.

  Args:
    name: one of `OPTIMIZERS`; see the functions of this module.
    lr_schedule: learning rate by the number of completed steps.
    momentum: momentum of SGD and Muon, beta_1 of AdamW.
    adam_b2: beta_2 of AdamW.
    weight_decay: coupled and for all parameters with SGD; decoupled and for
      kernels only with AdamW and Muon.
    grad_norm_clip: maximum global norm of the gradient; 0: no clipping.
    agc: threshold of adaptive gradient clipping, which comes first; 0: none.
    scalar_lr_mult: learning-rate multiplier for parameters of one element.
  """
  if name == "sgd":
    optimizer = sgd(
      lr_schedule,
      momentum=momentum,
      weight_decay=weight_decay,
      grad_norm_clip=grad_norm_clip,
    )
  else:
    direction = adam if name == "adamw" else muon
    optimizer = optax.chain(
      clipping.clip_by_global_norm(grad_norm_clip),
      direction(momentum, adam_b2),
      optax.add_decayed_weights(weight_decay, _kernel_mask),
      optax.scale_by_learning_rate(lr_schedule),
    )
  if scalar_lr_mult != 1:
    optimizer = optax.chain(optimizer, scale_scalars(scalar_lr_mult))
  if agc:
    optimizer = optax.chain(clipping.adaptive_clip(agc), optimizer)
  return optimizer


def sgd(
  lr_schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  grad_norm_clip: float,
) -> optax.GradientTransformation:
  """Return SGD with momentum: clip, decay, momentum, then learning rate.

  Weight decay is coupled (g + weight_decay * p) and applies to all parameters.
  It is added after clipping, so it is not clipped. 0 disables
  `grad_norm_clip`.
  """
  return optax.chain(
    clipping.clip_by_global_norm(grad_norm_clip),
    optax.add_decayed_weights(weight_decay),
    optax.trace(momentum),
    optax.scale_by_learning_rate(lr_schedule),
  )


def adam(b1: float, b2: float) -> optax.GradientTransformation:
  """Return AdamW's direction (Kingma & Ba 2015; Loshchilov & Hutter 2019).

  At step t, with running means m of the gradient g and v of its square:

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8)

  `create` adds weight_decay * p and multiplies the sum by the learning rate, as
  PyTorch does. Only kernels decay. Biases, parameters of norms, class token and
  position embeddings do not.
  """
  return optax.scale_by_adam(b1, b2)


def muon(momentum: float, b2: float) -> optax.GradientTransformation:
  """Return Muon's direction for the blocks' kernels, AdamW's for the rest.

  Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the
  Nesterov momentum of the gradient by the nearest semi-orthogonal matrix, with
  five Newton-Schulz iterations. Optax also corrects the momentum's bias towards
  0, which matters in the first steps only. A kernel is a matrix from all its
  inputs to all its outputs, [D, D] in attention. The factor
  0.2 sqrt(max(inputs, outputs)) gives updates the size of AdamW's, so both
  share one learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982,
  section 2.2).
  """

  def labels(params):
    def label(path, _):
      in_block = path[0].key == "Transformer" and kernels.is_kernel(path)
      return "muon" if in_block else "adam"

    return jax.tree_util.tree_map_with_path(label, params)

  def dimension_numbers(params):
    def numbers(path, x):
      inputs = kernels.num_input_axes(path, x)
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(inputs)), tuple(range(inputs, x.ndim))
      )

    return jax.tree_util.tree_map_with_path(numbers, params)

  def scale(updates, _):
    def scale_one(path, x):
      inputs = math.prod(x.shape[: kernels.num_input_axes(path, x)])
      return 0.2 * max(inputs, x.size // inputs) ** 0.5 * x

    return jax.tree_util.tree_map_with_path(scale_one, updates)

  orthogonalize = optax.contrib.scale_by_muon(
    beta=momentum, weight_dimension_numbers=dimension_numbers
  )
  return optax.partition(
    {
      "muon": optax.chain(orthogonalize, optax.stateless(scale)),
      "adam": adam(momentum, b2),
    },
    labels,
  )


def scale_scalars(factor: float) -> optax.GradientTransformation:
  """Return a transformation that scales updates of one-element parameters.

  The gradient of a scalar that multiplies D channels is a sum over D terms. If
  the channels also have separate scales, the scalar changes their common size D
  times as fast.
  """
  return optax.stateless(
    lambda updates, _: jax.tree.map(
      lambda x: factor * x if x.size == 1 else x, updates
    )
  )


def _kernel_mask(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: kernels.is_kernel(path), params
  )
