"""Share compiled programs among runs of one config in a process.

Tracing and lowering take most of a tiny run's time.
"""

from collections.abc import Iterator
import contextlib
import functools

import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment
from rescalevit_jax.training import train_step


@contextlib.contextmanager
def shared() -> Iterator[None]:
  """Create one `Experiment` per config; its only state is its programs."""
  create, made = experiment.create, {}

  def create_once(config, **kwargs):
    # Some tests replace the loss.
    key = config_lib.to_json(config), *kwargs.items(), train_step.loss_fn
    if key not in made:
      made[key] = create(config.copy_and_resolve_references(), **kwargs)
    return made[key]

  compiled_step = functools.cache(evaluate.compiled_step)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment, "create", create_once)
    patch.setattr(evaluate, "compiled_step", compiled_step)
    yield
