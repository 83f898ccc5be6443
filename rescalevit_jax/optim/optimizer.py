"""Schedule, clipping, weight decay and the optimizers: SGD, AdamW, Muon.

The defaults, SGD and the clipping by global norm, are the original's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd", "adamw", "muon")

# Of the least norm that adaptive gradient clipping grants to weights, so that
# those which start at 0 can move (Brock et al. 2021, section 4.1).
_LEAST_NORM = 1e-3

_SMALL = 2**10  # Elements of a small array, for `global_norm`.


def schedule(
  base_lr: float, warmup_steps: int, total_steps: int, decay_type: str
) -> optax.Schedule:
  """Learning rate: linear warm-up, then cosine or linear decay to 0.

  Step n (from 1) uses base_lr * f(n), with p = (n - warmup) / (total - warmup):

    f(n) = n / warmup, n < warmup;  (1 + cos(pi p)) / 2 or 1 - p after it

  so the first step already moves and the last one does not.

  Args:
    base_lr: the rate at the end of the warm-up.
    warmup_steps: steps of the warm-up, at most total_steps.
    total_steps: steps of the run.
    decay_type: 'cosine' or 'linear'.

  Returns:
    A function of the number of steps already done, as optax counts: n - 1.
  """
  decay_steps = max(1, total_steps - warmup_steps)
  if decay_type == "cosine":
    decay = optax.cosine_decay_schedule(base_lr, decay_steps)
  else:
    decay = optax.linear_schedule(base_lr, 0.0, decay_steps)
  warmup = optax.linear_schedule(0.0, base_lr, warmup_steps)
  rate = optax.join_schedules([warmup, decay], [warmup_steps])
  return lambda count: rate(count + 1)


def create(
  name: str,
  learning_rate: optax.Schedule,
  *,
  momentum: float,
  adam_b2: float,
  weight_decay: float,
  grad_norm_clip: float,
  agc: float,
  scalar_lr_mult: float,
) -> optax.GradientTransformation:
  """Returns an optimizer by its name, one of `OPTIMIZERS`.

  Args:
    name: 'sgd', 'adamw' or 'muon'; see the functions of this module.
    learning_rate: from the number of steps already done.
    momentum: of SGD and Muon; AdamW's beta_1.
    adam_b2: AdamW's beta_2.
    weight_decay: SGD's is coupled and holds for all parameters; that of the
      others is decoupled and holds for kernels.
    grad_norm_clip: largest global norm of a gradient; 0: any.
    agc: adaptive gradient clipping before that; 0: none.
    scalar_lr_mult: learning-rate multiplier for parameters of one element.
  """
  if name == "sgd":
    optimizer = sgd(
      learning_rate,
      momentum=momentum,
      weight_decay=weight_decay,
      grad_norm_clip=grad_norm_clip,
    )
  else:
    direction = adam if name == "adamw" else muon
    optimizer = optax.chain(
      _clip(grad_norm_clip),
      direction(momentum, adam_b2),
      optax.add_decayed_weights(weight_decay, _are_kernels),
      optax.scale_by_learning_rate(learning_rate),
    )
  if scalar_lr_mult != 1:
    optimizer = optax.chain(optimizer, scale_scalars(scalar_lr_mult))
  return optax.chain(clip_adaptively(agc), optimizer) if agc else optimizer


def sgd(
  learning_rate: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  grad_norm_clip: float,
) -> optax.GradientTransformation:
  """SGD with momentum: clip, then decay, then momentum, then the rate.

  Weight decay is coupled (g + weight_decay * p) and holds for all parameters;
  it is not subject to the clipping by global norm. A `grad_norm_clip` of 0 is
  none.
  """
  return optax.chain(
    _clip(grad_norm_clip),
    optax.add_decayed_weights(weight_decay),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )


def adam(b1: float, b2: float) -> optax.GradientTransformation:
  """AdamW's direction (Kingma & Ba 2015; Loshchilov & Hutter 2019).

  At step t, with m and v the running means of gradients g and of their squares:

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8)

  `create` adds weight_decay * p to it and multiplies both by the rate, as
  PyTorch does. Only kernels decay: not biases, norms' parameters, class token
  and positions.
  """
  return optax.scale_by_adam(b1, b2)


def muon(momentum: float, b2: float) -> optax.GradientTransformation:
  """Muon's direction for the blocks' kernels, AdamW's for all else.

  Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) takes the nearest
  semi-orthogonal matrix to the gradient's running mean with Nesterov's look
  ahead, by five Newton-Schulz iterations; as optax has it, corrected for the
  mean's bias towards 0, which counts in the first steps alone. A kernel is a
  matrix from all its inputs to all its outputs: those of attention are seen as
  [D, D]. Times 0.2 sqrt(max(inputs, outputs)), an update is of AdamW's size, so
  that one learning rate and weight decay do for both (Liu et al. 2025,
  arXiv:2502.16982, section 2.2).
  """

  def labels(params):
    def label(path, _):
      in_block = path[0].key == "Transformer" and _is_kernel(path)
      return "muon" if in_block else "adam"

    return jax.tree_util.tree_map_with_path(label, params)

  def dimension_numbers(params):
    def numbers(path, x):
      inputs = _inputs(path, x)
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(inputs)), tuple(range(inputs, x.ndim))
      )

    return jax.tree_util.tree_map_with_path(numbers, params)

  def scale(updates, _):
    def scale_one(path, x):
      inputs = math.prod(x.shape[: _inputs(path, x)])
      return 0.2 * max(inputs, x.size // inputs) ** 0.5 * x

    return jax.tree_util.tree_map_with_path(scale_one, updates)

  orthogonal = optax.contrib.scale_by_muon(
    beta=momentum, weight_dimension_numbers=dimension_numbers
  )
  return optax.partition(
    {
      "muon": optax.chain(orthogonal, optax.stateless(scale)),
      "adam": adam(momentum, b2),
    },
    labels,
  )


def clip_adaptively(clipping: float) -> optax.GradientTransformation:
  """Adaptive gradient clipping, AGC (Brock et al. 2021, arXiv:2102.06171).

  Equation 3: with w the weights of one unit and g their gradient,

    g = g * min(1, clipping * max(|w|, 1e-3) / |g|)

  A unit is what makes one output of a kernel, or any other parameter as a
  whole. The head is not clipped (section 4.1).
  """
  clip = optax.adaptive_grad_clip(clipping, eps=_LEAST_NORM, axis=0)

  def matrices(tree):
    def matrix(path, x):
      inputs = _inputs(path, x) if _is_kernel(path) else x.ndim
      return x.reshape(math.prod(x.shape[:inputs]), -1)

    return jax.tree_util.tree_map_with_path(matrix, tree)

  def update(grads, state, params):
    clipped, state = clip.update(matrices(grads), state, matrices(params))
    clipped = jax.tree.map(lambda x, g: x.reshape(g.shape), clipped, grads)
    if "head" in grads:
      clipped["head"] = grads["head"]
    return clipped, state

  return optax.GradientTransformation(clip.init, update)


def scale_scalars(factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of parameters of one element by a factor.

  The gradient of a number that multiplies D channels is a sum over them: where
  each channel has a scale, too, it moves their common size D times as fast.
  """
  return optax.stateless(
    lambda updates, _: jax.tree.map(
      lambda x: factor * x if x.size == 1 else x, updates
    )
  )


def global_norm(tree: Any) -> jax.Array:
  """Return the norm of all arrays of a tree as one vector, [] float32.

  As `optax.global_norm`, which takes two kernels for each array on a GPU. Small
  arrays are one here, and large ones are reduced by rows at first.
  """
  leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
  small = [x.ravel() for x in leaves if x.size <= _SMALL]
  # By the first axis: a reshaped sum would move parts between devices (fsdp).
  large = [jnp.square(x) for x in leaves if x.size > _SMALL]
  sums = [jnp.square(x) for x in small]
  sums += [x.sum(range(1, x.ndim)) for x in large]
  # Without the barrier XLA would make a sum of sums of it.
  sums = jax.lax.optimization_barrier(jnp.concatenate(sums))
  return jnp.sqrt(sums.sum())


def _clip(grad_norm_clip):
  if grad_norm_clip == 0:
    return optax.identity()

  def clip(updates, _):
    factor = jnp.minimum(1.0, grad_norm_clip / global_norm(updates))
    return jax.tree.map(lambda x: factor * x, updates)

  return optax.stateless(clip)


def _are_kernels(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _is_kernel(path), params
  )


def _is_kernel(path):
  return path[-1].key == "kernel"


def _inputs(path, kernel):
  """Returns how many of a kernel's axes, the first ones, are its inputs'.

  Those of query, key and value are [D, h, D/h], all others [..., outputs].
  """
  to_heads = path[-2].key in ("query", "key", "value")
  return 1 if to_heads else kernel.ndim - 1
