"""Arithmetic of a model, counted from its shapes."""

from rescalevit_jax.models import vit


def forward_flops(model: vit.VisionTransformer, image_size: int) -> int:
  """Floating-point operations of the matrix products of one image's forward.

  A product of [m, k] and [k, n] counts 2 m k n. Norms, GELU and softmax are
  left out. A training step takes about three times as much.
  """
  patches = (image_size // model.patch_size) ** 2
  n, d = patches + 1, model.hidden_size
  embedding = 2 * patches * model.patch_size**2 * 3 * d
  attention = 4 * 2 * n * d * d + 2 * 2 * n * n * d
  mlp = 2 * 2 * n * d * model.mlp_dim
  head = 2 * d * model.num_classes
  return embedding + model.num_layers * (attention + mlp) + head
