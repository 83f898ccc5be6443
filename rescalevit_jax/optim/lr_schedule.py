"""The learning-rate schedule: linear warm-up, a constant rate, then decay."""

import jax.numpy as jnp
import optax

DECAYS = ("cosine", "linear", "sqrt")


def create(
  base_lr: float,
  warmup_steps: int,
  total_steps: int,
  decay_type: str,
  decay_steps: int | None = None,
  min_lr: float = 0.0,
) -> optax.Schedule:
  """Return the learning-rate schedule: linear warm-up, then decay to `min_lr`.

  Step n (from 1) uses base_lr * n / warmup until the end of the warm-up, and
  min_lr + (base_lr - min_lr) * f(p) in the last `decay_steps` steps, with
  p = (n - total) / decay + 1:

    cosine: f(p) = (1 + cos(pi p)) / 2;  linear: 1 - p;  sqrt: 1 - sqrt(p)

  The rate is constant in between. With a short decay this is WSD (warm-up,
  stable, decay; Hu et al. 2024, arXiv:2404.06395). Hägele et al. 2024
  (arXiv:2405.18392) find `sqrt` best for it. By default all steps after the
  warm-up decay.

  Returns:
    A function of the number of completed steps, n - 1, as optax counts.
  """
  steps = total_steps - warmup_steps if decay_steps is None else decay_steps
  begin = total_steps - steps
  steps = max(1, steps)
  if decay_type == "cosine":
    decay = optax.cosine_decay_schedule(base_lr, steps, min_lr / base_lr)
  elif decay_type == "linear":
    decay = optax.linear_schedule(base_lr, min_lr, steps)
  else:

    def decay(count):
      share = jnp.clip(count / steps, 0.0, 1.0)
      return base_lr - (base_lr - min_lr) * jnp.sqrt(share)

  lr_schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, base_lr, warmup_steps),
      optax.constant_schedule(base_lr),
      decay,
    ],
    [warmup_steps, begin],
  )
  return lambda count: lr_schedule(count + 1)
