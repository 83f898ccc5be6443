"""GPUs to compile for: descriptions and peak speeds."""

import dataclasses
import pathlib
import re

from rescalevit_jax import errors
from rescalevit_jax.runtime import accelerator

_DESCRIPTIONS = pathlib.Path(__file__).parent / "gpu_targets"

# Peak speed of dense matrix products in 10^12 FLOP/s: float16 with float32 sums
# (equals bfloat16 since Ampere), TF32 (since Ampere), float32. From NVIDIA's
# data sheets (T4, V100 SXM2, A100, L4, H100 SXM, H200, HGX B200), which state
# twice as much since L4, for sparse matrices, and its white papers of the
# architectures GA102 (RTX 3090) and Ada (RTX 4090).
_TERAFLOPS = {
  "t4": (65, None, 8.1),
  "v100": (125, None, 15.7),
  "rtx3090": (71, 35.6, 35.6),
  "a100-40": (312, 156, 19.5),
  "a100-80": (312, 156, 19.5),
  "l4": (121, 60, 30.3),
  "rtx4090": (165.2, 82.6, 82.6),
  "h100": (989, 494.7, 66.9),
  "h200": (989, 494.7, 66.9),
  "b200": (2250, 1125, 75),
}
NAMES = tuple(_TERAFLOPS)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU, which need not be present."""

  name: str  # One of `NAMES`.
  title: str  # CUDA's name.
  description: str  # Text of XLA's proto GpuTargetConfigProto.
  capability: tuple[int, int]
  memory_bytes: int
  bandwidth: float  # Of the memory, in bytes/s.

  @property
  def accelerator(self) -> accelerator.Accelerator:
    """Description by which the model selects implementations."""
    return accelerator.Accelerator("gpu", self.capability)

  def flops_per_second(self, dtype: str, exact: bool = False) -> float:
    """Return the peak speed of products of HLO's 'f32', 'bf16' or 'f16'.

    `exact` excludes TF32 for float32 products.
    """
    half, tf32, single = _TERAFLOPS[self.name]
    if dtype in ("f16", "bf16"):
      return half * 1e12
    return (single if exact or tf32 is None else tf32) * 1e12


def get(name: str) -> Gpu:
  """Return a GPU by its name.

  Raises:
    UserError: the name is unknown.
  """
  if name not in NAMES:
    raise errors.UserError(
      f"--compile_for: unknown GPU {name!r}; {errors.nearest(name, NAMES)}"
    )
  text = (_DESCRIPTIONS / f"{name}.txtpb").read_text(encoding="utf-8")

  def value(key):
    return re.search(rf"^ *{key}: \"?([^\"\n]+)", text, re.MULTILINE).group(1)

  return Gpu(
    name,
    value("device_description_str"),
    text,
    (int(value("major")), int(value("minor"))),
    int(value("device_memory_size")),
    float(value("memory_bandwidth")),
  )
