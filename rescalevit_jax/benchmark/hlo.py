"""Read the kernels of a GPU program from its optimized HLO.

`jax.stages.Compiled.as_text()` returns the HLO. Each instruction that is not
bookkeeping is a kernel: a fusion, a library call, a copy. A kernel reads its
operands and writes its results once. Workspaces of libraries are not counted.
"""

import collections
import dataclasses
import re

from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import hlo_cost
from rescalevit_jax.benchmark import hlo_parse

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOOKKEEPING = {
  "after-all",
  "bitcast",
  "constant",
  "get-tuple-element",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
}
_HOST_OPCODES = {"infeed", "outfeed", "send", "recv"}
_HOST_TARGETS = re.compile("callback|host", re.IGNORECASE)
_HOST_MEMORY = "S(5)"  # XLA's number of host memory, in a layout.


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One launch on the GPU."""

  kind: str  # Library function, or opcode.
  op_name: str  # Path of the module in the model.
  read: float  # Bytes.
  written: float  # Bytes.
  flops: float = 0.0  # Of matrix products, attention and convolutions.
  dtype: str = ""  # Of the products' factors, such as 'bf16'.
  exact: bool = False  # True if float32 products keep all bits (no TF32).

  @property
  def bytes(self) -> float:
    """Bytes read and written."""
    return self.read + self.written

  @property
  def is_gemm(self) -> bool:
    """True for a library's matrix product or a fusion with one."""
    return self.flops > 0 and not self.kind.startswith("__cudnn")

  def seconds(self, gpu: gpus.Gpu) -> float:
    """Return a lower bound of one launch: memory and products overlap."""
    seconds = self.bytes / gpu.bandwidth
    if self.flops:
      peak = gpu.flops_per_second(self.dtype, self.exact)
      seconds = max(seconds, self.flops / peak)
    return seconds


@dataclasses.dataclass
class Program:
  """The operations of one GPU in a step.

  Attributes:
    kernels: launches in program order; a conditional counts its cheapest
      branch.
    collectives: communications between GPUs. A collective in a loop is listed
      once, its kernel once per iteration.
    conditionals: names of conditionals, whose branch the host selects.
    host_transfers: names of instructions that move data to or from the host.
  """

  kernels: list[Kernel] = dataclasses.field(default_factory=list)
  collectives: list[hlo_parse.Instruction] = dataclasses.field(
    default_factory=list
  )
  conditionals: list[str] = dataclasses.field(default_factory=list)
  host_transfers: list[str] = dataclasses.field(default_factory=list)

  @property
  def kinds(self) -> collections.Counter[str]:
    """Number of kernels of each kind per step."""
    return collections.Counter(k.kind for k in self.kernels)

  @property
  def gemms(self) -> int:
    """Number of matrix products per step."""
    return sum(k.is_gemm for k in self.kernels)

  @property
  def bytes(self) -> float:
    """Bytes read and written per step."""
    return sum(k.bytes for k in self.kernels)

  @property
  def flops(self) -> float:
    """FLOPs of matrix products per step."""
    return sum(k.flops for k in self.kernels)

  def seconds(self, gpu: gpus.Gpu) -> float:
    """Return a lower bound of the step time: kernels run one after another."""
    return sum(k.seconds(gpu) for k in self.kernels)

  def add(self, other: "Program") -> None:
    """Append another part of the program."""
    for field in dataclasses.fields(self):
      getattr(self, field.name).extend(getattr(other, field.name))


def read(text: str) -> Program:
  """Return the operations of a program from its optimized HLO."""
  computations, entry = hlo_parse.parse(text)
  return _visit(computations[entry], computations)


def _visit(computation, computations) -> Program:
  program = Program()
  for instruction in computation.values():
    opcode = instruction.opcode
    called = [computations[name] for name in instruction.called]
    if (
      instruction.kind.removesuffix("-done") in _HOST_OPCODES
      or _HOST_MEMORY in instruction.type
      or _HOST_TARGETS.search(instruction.target)
    ):
      program.host_transfers.append(instruction.name)
    if opcode in _BOOKKEEPING or opcode.endswith(("-done", "-update")):
      continue
    if opcode in ("call", "async-start", "while"):
      trips = _TRIPS.search(instruction.attributes)
      for part in called:
        found = _visit(part, computations)
        found.kernels *= int(trips.group(1)) if trips else 1
        program.add(found)
    elif opcode == "conditional":
      program.conditionals.append(instruction.name)
      branches = [_visit(part, computations) for part in called]
      program.add(min(branches, key=lambda branch: branch.bytes))
    else:
      program.kernels.append(_read_kernel(instruction, computation, called))
      if instruction.kind in hlo_cost.COLLECTIVES:
        program.collectives.append(instruction)
  return program


def _read_kernel(instruction, computation, called) -> Kernel:
  if instruction.opcode == "fusion":
    where = called[0]
    parts = list(where.values())
    inputs = [i for i in parts if i.opcode == "parameter"]
    read = sum(hlo_cost.bytes_read(i, where) for i in inputs)
    (result,) = (i for i in parts if i.is_root)
  else:
    where, parts, result = computation, [instruction], instruction
    read = sum(
      hlo_cost.bytes_read(computation[name], {instruction.name: instruction})
      for name in dict.fromkeys(instruction.operands)
    )
  flops = {i: n for i in parts if (n := hlo_cost.flops(i, where))}
  dtype, exact = "", False
  for product in flops:
    dtype = where[product.operands[0]].shapes[0].dtype
    exact = "highest" in product.attributes.lower()
  return Kernel(
    instruction.target or instruction.opcode,
    instruction.op_name,
    read,
    hlo_cost.bytes_written(result, where),
    sum(flops.values()),
    dtype,
    exact,
  )
