"""The Jacobian's norm against jax.jacobian and against arithmetic by hand."""

import jax
import numpy as np
import pytest
import tiny_model

from rescalevit_jax.models import vit
from rescalevit_jax.training import jacobian

IMAGES = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3))
IMAGES = IMAGES.astype(np.float32)
COUNT = 2000  # Copies of the image, each with a separate random vector.


def measured(tiny):
  images = np.repeat(IMAGES, COUNT, axis=0)
  variables = tiny.variables
  params, batch_stats = variables["params"], variables["batch_stats"]
  found = jacobian.norms(params, batch_stats, images, 0, model=tiny.model)
  return np.asarray(found["jacobian"])


@pytest.mark.parametrize("norm", ["LN", "DyT"])
def test_norm_equals_the_norm_of_the_full_jacobian(norm):
  tiny = tiny_model.create(norm, num_layers=2)
  config = tiny.model.config

  def block(i, x):
    module = vit.EncoderBlock(config, block=i + 1)
    params = tiny.variables["params"]["Transformer"][f"encoderblock_{i}"]
    # Observing the last block makes it return all tokens.
    y, _ = module.apply(
      {"params": params}, x[None], False, None, mutable=["intermediates"]
    )
    return y[0]

  _, found = tiny.model.apply(
    tiny.variables,
    IMAGES,
    capture_intermediates=lambda module, _: isinstance(
      module, vit.PositionEmbedding
    ),
    mutable=["intermediates"],
  )
  found = found["intermediates"]["Transformer"]["posembed_input"]
  streams = [found["__call__"][0][0]]
  streams.append(block(0, streams[0]))
  second = jax.jacobian(lambda x: block(1, x))(streams[1])
  both = jax.jacobian(lambda x: block(1, block(0, x)))(streams[0])
  size = streams[0].size
  want = [np.square(both).sum() / size, np.square(second).sum() / size, 1]
  np.testing.assert_allclose(measured(tiny), want, rtol=0.1)
  assert want[0] > 1.1 * want[1] > 1.2


def test_zero_branches_keep_the_gradient():
  tiny = tiny_model.create("LN", num_layers=2)
  tiny.variables["params"] = jax.tree.map(
    np.zeros_like, tiny.variables["params"]
  )
  first, second, last = measured(tiny)
  assert first == second == pytest.approx(1, rel=0.05)
  assert last == 1
