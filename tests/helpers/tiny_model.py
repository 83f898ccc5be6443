"""A model of a few thousand parameters whose attention is not uniform."""

import jax
import numpy as np

from rescalevit_jax import models
from rescalevit_jax.analysis import trained_model


def create(norm="LN", num_layers=3):
  model = models.create(
    "ViT-XS_2",
    num_classes=5,
    norm=norm,
    image_size=8,
    patch_size=4,
    hidden_size=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=num_layers,
  )
  x = np.zeros((1, 8, 8, 3))
  variables = {"batch_stats": {}, **model.init(jax.random.key(0), x)}
  # Initial queries and keys are too small for nonuniform attention.
  variables["params"] = jax.tree.map(lambda x: 2 * x, variables["params"])
  return trained_model.TrainedModel("tiny", model, variables, 8, tuple("01234"))
