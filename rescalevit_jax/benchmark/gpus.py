"""GPUs to compile for: descriptions and peak speeds, from gpus.toml."""

import dataclasses
import pathlib
import string
import tomllib

from rescalevit_jax import errors
from rescalevit_jax.runtime import accelerator

_FOLDER = pathlib.Path(__file__).parent
_FIGURES = tomllib.loads((_FOLDER / "gpus.toml").read_text(encoding="utf-8"))
NAMES = tuple(_FIGURES)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU, which need not be present."""

  name: str  # One of `NAMES`.
  title: str  # CUDA's name.
  description: str  # Text of XLA's proto GpuTargetConfigProto.
  capability: tuple[int, int]
  memory_bytes: int
  bandwidth: float  # Of the memory, in bytes/s.
  teraflops: tuple[float, float, float]  # See gpus.toml.

  @property
  def accelerator(self) -> accelerator.Accelerator:
    """Description by which the model selects implementations."""
    return accelerator.Accelerator("gpu", self.capability)

  def flops_per_second(self, dtype: str, exact: bool = False) -> float:
    """Return the peak speed of products of HLO's 'f32', 'bf16' or 'f16'.

    `exact` excludes TF32 for float32 products.
    """
    half, tf32, single = self.teraflops
    if dtype in ("f16", "bf16"):
      return half * 1e12
    return (single if exact or not tf32 else tf32) * 1e12


def get(name: str) -> Gpu:
  """Return a GPU by its name.

  Raises:
    UserError: the name is unknown.
  """
  if name not in NAMES:
    raise errors.UserError(
      f"--compile_for: unknown GPU {name!r}; {errors.nearest(name, NAMES)}"
    )
  figures = _FIGURES[name]
  major, minor = figures["capability"]
  accelerated = major >= 9  # Has instructions that later GPUs lack.
  template = (_FOLDER / "gpu_target.txtpb").read_text(encoding="utf-8")
  text = string.Template(template).substitute(
    figures,
    major=major,
    minor=minor,
    suffix="a" if accelerated else "",
    feature_extension="ACCELERATED_FEATURES" if accelerated else "NONE",
    ecc_enabled=str(figures["ecc_enabled"]).lower(),
  )
  return Gpu(
    name,
    figures["title"],
    f"# Figures: {figures['source']}.\n{text}",
    (major, minor),
    figures["device_memory_size"],
    figures["memory_bandwidth"],
    tuple(figures["teraflops"]),
  )
