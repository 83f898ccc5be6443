"""The learning-rate schedule: linear warm-up, then cosine or linear decay."""

import optax


def create(
  base_lr: float, warmup_steps: int, total_steps: int, decay_type: str
) -> optax.Schedule:
  """Return the learning-rate schedule: linear warm-up, then decay to 0.

  Step n (from 1) uses base_lr * f(n), with p = (n - warmup) / (total - warmup):

    f(n) = n / warmup, n < warmup;  (1 + cos(pi p)) / 2 or 1 - p after it

  The first step has a positive learning rate, the last one has 0.

  Args:
    base_lr: learning rate at the end of the warm-up.
    warmup_steps: length of the warm-up, at most `total_steps`.
    total_steps: length of the run.
    decay_type: "cosine" or "linear".

  Returns:
    A function of the number of completed steps, n - 1, as optax counts.
  """
  decay_steps = max(1, total_steps - warmup_steps)
  if decay_type == "cosine":
    decay = optax.cosine_decay_schedule(base_lr, decay_steps)
  else:
    decay = optax.linear_schedule(base_lr, 0.0, decay_steps)
  warmup = optax.linear_schedule(0.0, base_lr, warmup_steps)
  lr_schedule = optax.join_schedules([warmup, decay], [warmup_steps])
  return lambda count: lr_schedule(count + 1)
