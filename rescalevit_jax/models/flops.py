"""Arithmetic of a model, counted from its sizes."""

from rescalevit_jax.models import vit_config


def forward_flops(config: vit_config.ViTConfig) -> int:
  """Return the floating-point operations of one image's forward pass.

  Only matrix products count: [m, k] times [k, n] takes 2 m k n operations. A
  training step takes about three times as many.
  """
  patches = (config.image_size // config.patch_size) ** 2
  n, d = patches + 1, config.hidden_size
  embedding = 2 * patches * config.patch_size**2 * 3 * d
  attention = 4 * 2 * n * d * d + 2 * 2 * n * n * d
  mlp = 2 * 2 * n * d * config.mlp_dim
  # Without a pre_logits layer, the head's input has the width d.
  width = config.representation_size
  head = 2 * (width or d) * config.num_classes + 2 * d * (width or 0)
  return embedding + config.num_layers * (attention + mlp) + head
