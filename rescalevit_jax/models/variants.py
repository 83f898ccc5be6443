"""The table of model sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
  """Sizes of a Vision Transformer.

  Attributes:
    patch_size: edge of a square patch, in pixels.
    hidden_size: width D of a token.
    mlp_dim: width of the hidden layer of the MLP.
    num_heads: attention heads; divides hidden_size.
    num_layers: encoder blocks.
  """

  patch_size: int
  hidden_size: int
  mlp_dim: int
  num_heads: int
  num_layers: int


# Ti to H: Dosovitskiy et al. 2021 (arXiv:2010.11929), Table 1, and Steiner et
# al. 2022 (arXiv:2106.10270), Table 2. XS is ours, for small images on a CPU.
VARIANTS = {
  "ViT-XS_2": Variant(2, 64, 256, 4, 4),
  "ViT-XS_4": Variant(4, 64, 256, 4, 4),
  "ViT-Ti_16": Variant(16, 192, 768, 3, 12),
  "ViT-S_16": Variant(16, 384, 1536, 6, 12),
  "ViT-B_16": Variant(16, 768, 3072, 12, 12),
  "ViT-B_32": Variant(32, 768, 3072, 12, 12),
  "ViT-L_16": Variant(16, 1024, 4096, 16, 24),
  "ViT-L_32": Variant(32, 1024, 4096, 16, 24),
  "ViT-H_14": Variant(14, 1280, 5120, 16, 32),
}
