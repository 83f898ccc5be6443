"""Schedule, clipping, weight decay and SGD, as the original applies them."""

import optax


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
  clip = optax.identity()
  if grad_norm_clip > 0:
    clip = optax.clip_by_global_norm(grad_norm_clip)
  return optax.chain(
    clip,
    optax.add_decayed_weights(weight_decay),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )
