"""The optimizers: SGD, AdamW and Muon, with clipping and weight decay.

The defaults, SGD with clipping by global norm, are RescaleViT's. AdamW is
PyTorch's: weight decay is decoupled and multiplied by the learning rate
(Loshchilov & Hutter 2019). With AdamW and Muon only kernels decay; biases,
parameters of norms, class token and position embeddings do not.
"""

import jax
import jax.numpy as jnp
import optax

from rescalevit_jax import errors
from rescalevit_jax.optim import clipping
from rescalevit_jax.optim import groups
from rescalevit_jax.optim import kernels

OPTIMIZERS = ("sgd", "adamw", "muon")

# Largest number of elements of an update that shares a kernel with others: all
# biases and norm scales. Larger arrays would add memory traffic.
_SMALL = 2**13


def create(
  name: str,
  lr_schedule: optax.Schedule,
  *,
  momentum: float,
  adam_b2: float,
  weight_decay: float,
  grad_norm_clip: float,
  agc: float,
  lr_mult: str | None = None,
  wd_mult: str | None = None,
  layer_decay: float = 1.0,
  spectral_cap: float = 0.0,
) -> optax.GradientTransformation:
  """Return an optimizer by its name.

  The keyword arguments are config keys; `config/optim_keys.py` describes them.
  """
  lr_table, wd_table = groups.parse(lr_mult), groups.parse(wd_mult)
  if wd_table and not weight_decay:
    raise errors.UserError(
      f"config: wd_mult ({wd_mult}) multiplies weight_decay ({weight_decay});"
      " set weight_decay"
    )
  if name == "sgd":
    optimizer = sgd(
      lr_schedule,
      momentum=momentum,
      weight_decay=weight_decay,
      grad_norm_clip=grad_norm_clip,
      wd_table=wd_table,
    )
  else:
    direction = optax.scale_by_adam if name == "adamw" else muon
    optimizer = optax.chain(
      clipping.clip_by_global_norm(grad_norm_clip),
      direction(momentum, adam_b2),
      decay_kernels(weight_decay, wd_table),
      scale_by_learning_rate(lr_schedule),
    )
  if lr_table or layer_decay != 1:
    optimizer = optax.chain(optimizer, scale_groups(lr_table, layer_decay))
  if spectral_cap:
    cap = cap_singular_values(spectral_cap, lr_table)
    optimizer = optax.chain(optimizer, cap)
  if agc:
    optimizer = optax.chain(clipping.adaptive_clip(agc), optimizer)

  def init(params):
    groups.check("lr_mult", lr_table, params)
    groups.check("wd_mult", wd_table, params)
    return optimizer.init(params)

  return optax.GradientTransformation(init, optimizer.update)


def sgd(
  lr_schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  grad_norm_clip: float,
  wd_table: groups.Table = (),
) -> optax.GradientTransformation:
  """Return SGD with momentum: clip, decay, momentum, then learning rate.

  Weight decay is coupled (g + weight_decay * p). It applies to all parameters,
  with the multipliers of `wd_table`, and is not clipped. 0 disables
  `grad_norm_clip`.
  """
  return optax.chain(
    clipping.clip_by_global_norm(grad_norm_clip),
    _add_decayed_weights(weight_decay, wd_table, 1.0),
    optax.trace(momentum),
    scale_by_learning_rate(lr_schedule),
  )


def scale_by_learning_rate(
  lr_schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Return optax's transformation of this name, with fewer GPU kernels.

  XLA fuses kernels that share an array operand; a shared scalar does not count.
  Therefore, small updates of one shape are multiplied by the same array, filled
  with the learning rate.
  """

  def update(updates, state, params=None):
    del params
    factor = -jnp.asarray(lr_schedule(state.count))
    filled = {}

    def scale(x):
      if x.size > _SMALL:
        return factor.astype(x.dtype) * x
      kind = x.shape, x.dtype
      if kind not in filled:
        array = jnp.full(x.shape, factor, x.dtype)
        filled[kind] = jax.lax.optimization_barrier(array)
      return filled[kind] * x

    count = optax.safe_increment(state.count)
    return jax.tree.map(scale, updates), optax.ScaleByScheduleState(count)

  init = optax.scale_by_learning_rate(lr_schedule).init
  return optax.GradientTransformation(init, update)


def cap_singular_values(
  limit: float, lr_table: groups.Table
) -> optax.GradientTransformation:
  """Return a transformation that caps the blocks' kernels after the step.

  Kernels whose factor in `lr_table` is 0 stay as they are.

  Newhouse et al. 2025 (arXiv:2507.13338): each singular value s of a kernel,
  as a matrix from all its inputs to all its outputs, becomes

    min(s, limit * sqrt(outputs / inputs)),

  which bounds the layer's Lipschitz constant with respect to root mean squares
  by `limit`. This uses an exact SVD; their fast form is a polynomial.
  """

  def update(updates, params):
    def cap(path, update, kernel, factor):
      if not kernels.is_block_kernel(path) or not factor:
        return update
      inputs, outputs = kernels.matrix_shape(path, kernel)
      matrix = (kernel + update).reshape(inputs, outputs)
      left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
      most = limit * (outputs / inputs) ** 0.5
      capped = (left * jnp.minimum(values, most)) @ right
      return capped.reshape(kernel.shape) - kernel

    factors = groups.factors(lr_table, params)
    return jax.tree.map_with_path(cap, updates, params, factors)

  return optax.stateless(update)


def muon(momentum: float, b2: float) -> optax.GradientTransformation:
  """Return Muon's direction for the blocks' kernels, AdamW's for the rest.

  Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the
  Nesterov momentum of the gradient by the nearest semi-orthogonal matrix, with
  five Newton-Schulz iterations. Optax also corrects the momentum's bias toward
  0, which matters in the first steps only. A kernel is a matrix from all its
  inputs to all its outputs, [D, D] in attention. The factor
  0.2 sqrt(max(inputs, outputs)) gives updates the size of AdamW's, so both
  share one learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982,
  section 2.2).
  """

  def labels(params):
    def label(path, _):
      return "muon" if kernels.is_block_kernel(path) else "adam"

    return jax.tree.map_with_path(label, params)

  def dimension_numbers(params):
    def numbers(path, x):
      inputs = kernels.num_input_axes(path, x)
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(inputs)), tuple(range(inputs, x.ndim))
      )

    return jax.tree.map_with_path(numbers, params)

  def scale(updates, _):
    def scale_one(path, x):
      return 0.2 * max(kernels.matrix_shape(path, x)) ** 0.5 * x

    return jax.tree.map_with_path(scale_one, updates)

  orthogonalize = optax.contrib.scale_by_muon(
    beta=momentum, weight_dimension_numbers=dimension_numbers
  )
  return optax.partition(
    {
      "muon": optax.chain(orthogonalize, optax.stateless(scale)),
      "adam": optax.scale_by_adam(momentum, b2),
    },
    labels,
  )


def decay_kernels(
  weight_decay: float, table: groups.Table
) -> optax.GradientTransformation:
  """Return a transformation that adds weight_decay * p to kernels' updates.

  A factor of the table overrides this rule for the parameters that it matches.
  """

  def decays(params):
    return jax.tree.map(bool, groups.factors(full, params, 0.0))

  full = (*table, ("kernels", 1.0))
  return optax.masked(_add_decayed_weights(weight_decay, full, 0.0), decays)


def _add_decayed_weights(weight_decay, table, default):
  def add_one(g, p, factor):
    rate = weight_decay * factor
    # XLA would not drop `0 * p`, and would round other operations differently.
    return g if isinstance(rate, float) and rate == 0 else g + rate * p

  def add(updates, params):
    factors = groups.factors(table, params, default)
    return jax.tree.map(add_one, updates, params, factors)

  return optax.stateless(add)


def scale_groups(
  table: groups.Table, layer_decay: float
) -> optax.GradientTransformation:
  """Return a transformation that scales the updates of groups of parameters.

  The multiplier of a parameter is its entry in the table times
  layer_decay^(L + 1 - layer), with the layers of `groups.layer` (Bao et al.
  2022, BEiT, arXiv:2106.08254; Clark et al. 2020, arXiv:2003.10555). Both
  multiply the decoupled weight decay, too, as in PyTorch.
  """

  def scale(updates, _):
    num_layers = groups.num_layers(updates)

    def scale_one(path, x, factor):
      depth = groups.layer(path, num_layers)
      factor *= layer_decay ** (num_layers + 1 - depth)
      return x if factor == 1 else factor * x

    factors = groups.factors(table, updates)
    return jax.tree.map_with_path(scale_one, updates, factors)

  return optax.stateless(scale)
