"""RescaleViT-JAX: Vision Transformers with and without normalization."""

__version__ = "0.1.0"
