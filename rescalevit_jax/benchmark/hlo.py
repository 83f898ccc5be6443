"""Read optimised GPU HLO: kernels, their bytes and FLOPs, what else it does.

`jax.stages.Compiled.as_text()` is the text. Each instruction of the program
that is not bookkeeping is a kernel: a fusion, a call of a library, a copy. It
reads its operands and writes its results once; a sliced operand counts as its
slices, an in-place result as its update. Scratch
memory of libraries is left out.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import math
import re

from rescalevit_jax.benchmark import gpus

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$"
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]\w*|pred)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
  r"=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
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
_SLICING = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = {
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
}
_HOST_OPCODES = {"infeed", "outfeed", "send", "recv"}
_HOST_TARGETS = re.compile("callback|host", re.IGNORECASE)
_HOST_MEMORY = "S(5)"  # In a layout: XLA's number of the host's memory.


@dataclasses.dataclass(frozen=True)
class Shape:
  """Type and dimensions of an array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Size in memory."""
    if self.dtype == "pred":
      return self.size
    return self.size * int(re.search(r"\d+", self.dtype).group()) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: unique in its computation.
    opcode: such as 'fusion'.
    type: of the result, as written.
    shapes: of the result's arrays.
    operands: names.
    literal: the text between the parentheses, such as a parameter's number.
    attributes: the text behind them.
    is_root: whether it is its computation's result.
  """

  name: str
  opcode: str
  type: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  @property
  def target(self) -> str:
    """Target of a custom call; empty otherwise."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found.group(1) if found else ""

  @property
  def op_name(self) -> str:
    """Path of the module that it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ""

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    branches = _BRANCHES.search(self.attributes)
    found = _NAME.findall(branches.group(1)) if branches else []
    return _CALLED.findall(self.attributes) + found

  @property
  def bytes(self) -> float:
    """Size of the result, without scratch memory."""
    shapes = self.shapes
    if self.opcode == "custom-call" and len(shapes) > 1:
      if shapes[-1].dtype in ("s8", "u8"):
        shapes = shapes[:-1]
    return sum(shape.bytes for shape in shapes)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One launch on the GPU.

  Attributes:
    kind: the library's function, or the opcode.
    op_name: where in the model it comes from.
    read: bytes.
    written: bytes.
    flops: of its matrix products, attention and convolutions.
    dtype: of the factors of its products, such as 'bf16'; empty without any.
    exact: whether products of float32 keep all bits (no TF32).
    times: how often it runs in a step.
  """

  kind: str
  op_name: str
  read: float
  written: float
  flops: float = 0.0
  dtype: str = ""
  exact: bool = False
  times: int = 1

  @property
  def bytes(self) -> float:
    """Bytes read and written."""
    return self.read + self.written

  @property
  def is_gemm(self) -> bool:
    """True for a matrix product of a library or a fusion with one."""
    return self.flops > 0 and not self.kind.startswith("__cudnn")

  def seconds(self, gpu: gpus.Gpu) -> float:
    """Return the least time of one run: memory and products overlap."""
    seconds = self.bytes / gpu.bandwidth
    if self.flops:
      peak = gpu.flops_per_second(self.dtype, self.exact)
      seconds = max(seconds, self.flops / peak)
    return seconds


@dataclasses.dataclass(frozen=True)
class Collective:
  """What GPUs tell each other; also a `Kernel`.

  Attributes:
    kind: such as 'all-reduce'.
    shapes: of one GPU's operands.
    op_name: where in the model it comes from.
  """

  kind: str
  shapes: tuple[Shape, ...]
  op_name: str


@dataclasses.dataclass
class Program:
  """What one GPU does in a step.

  Attributes:
    kernels: in the order of the text, without those of a conditional's more
      expensive branches.
    collectives: likewise.
    conditionals: names of instructions whose branch the host chooses.
    host_transfers: names of instructions that move data to or from the host.
  """

  kernels: list[Kernel] = dataclasses.field(default_factory=list)
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  conditionals: list[str] = dataclasses.field(default_factory=list)
  host_transfers: list[str] = dataclasses.field(default_factory=list)

  @property
  def launches(self) -> int:
    """Kernels of a step."""
    return sum(k.times for k in self.kernels)

  @property
  def gemms(self) -> int:
    """Matrix products of a step."""
    return sum(k.times for k in self.kernels if k.is_gemm)

  @property
  def bytes(self) -> float:
    """Bytes that a step reads and writes."""
    return sum(k.times * k.bytes for k in self.kernels)

  @property
  def flops(self) -> float:
    """FLOPs of a step's products."""
    return sum(k.times * k.flops for k in self.kernels)

  def seconds(self, gpu: gpus.Gpu) -> float:
    """Return a lower bound of a step's time: kernels one after another."""
    return sum(k.times * k.seconds(gpu) for k in self.kernels)

  def add(self, other: "Program") -> None:
    """Append what another part of the program does."""
    for field in dataclasses.fields(self):
      getattr(self, field.name).extend(getattr(other, field.name))


_Computation = Mapping[str, Instruction]


def read(text: str) -> Program:
  """Return what a program does.

  Args:
    text: optimised HLO.
  """
  computations, entry = parse(text)
  return _visit(computations[entry], computations, 1)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """Return instructions by computation and name, and the entry's name."""
  computations, current, entry = {}, None, ""
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations[header.group(2)] = {}
      if header.group(1):
        entry = header.group(2)
    elif match := _INSTRUCTION.match(line):
      root, name, kind, opcode, rest = match.groups()
      literal, attributes = _split_operands(rest)
      current[name] = Instruction(
        name,
        opcode,
        kind,
        _shapes(kind),
        tuple(_NAME.findall(literal)),
        literal,
        attributes,
        bool(root),
      )
  return computations, entry


def _split_operands(text):
  """Return the text up to the closing parenthesis, and the rest."""
  depth = 1
  for match in re.finditer(r"[()]", text):
    depth += 1 if match.group() == "(" else -1
    if not depth:
      return text[: match.start()], text[match.end() :]
  return text, ""


def _shapes(text):
  return tuple(
    Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(text)
  )


def _visit(computation, computations, times) -> Program:
  program = Program()
  for instruction in computation.values():
    opcode = instruction.opcode
    called = [computations[name] for name in instruction.called]
    if (
      opcode.removesuffix("-start").removesuffix("-done") in _HOST_OPCODES
      or _HOST_MEMORY in instruction.type
      or _HOST_TARGETS.search(instruction.target)
    ):
      program.host_transfers.append(instruction.name)
    if opcode in _BOOKKEEPING or opcode.endswith(("-done", "-update")):
      continue
    if opcode in ("call", "async-start"):
      for part in called:
        program.add(_visit(part, computations, times))
    elif opcode == "while":
      trips = _TRIPS.search(instruction.attributes)
      trips = int(trips.group(1)) if trips else 1
      for part in called:
        program.add(_visit(part, computations, times * trips))
    elif opcode == "conditional":
      program.conditionals.append(instruction.name)
      branches = [_visit(part, computations, times) for part in called]
      program.add(min(branches, key=lambda branch: branch.bytes))
    else:
      program.kernels.append(
        _kernel(instruction, computation, computations, times)
      )
      kind = opcode.removesuffix("-start")
      if kind in _COLLECTIVES:
        shapes = _operand_shapes(instruction, computation)
        program.collectives.append(
          Collective(kind, shapes, instruction.op_name)
        )
  return program


def _operand_shapes(instruction, computation):
  return tuple(
    shape for name in instruction.operands for shape in computation[name].shapes
  )


def _kernel(instruction, computation, computations, times) -> Kernel:
  if instruction.opcode == "fusion":
    inside = computations[instruction.called[0]]
    read = sum(
      _taken(i, inside) for i in inside.values() if i.opcode == "parameter"
    )
    (root,) = (i for i in inside.values() if i.is_root)
    written = _written(root, inside)
    products = [(i, inside) for i in inside.values()]
  else:
    read = sum(
      _taken(computation[name], {instruction.name: instruction})
      for name in dict.fromkeys(instruction.operands)
    )
    written = _written(instruction, computation)
    products = [(instruction, computation)]
  flops = {i: _flops(i, where) for i, where in products}
  flops = {i: n for i, n in flops.items() if n}
  dtype, exact = "", False
  for i, where in products:
    if i in flops:
      dtype = where[i.operands[0]].shapes[0].dtype
      exact = "highest" in i.attributes.lower()
  return Kernel(
    instruction.target or instruction.opcode,
    instruction.op_name,
    read,
    written,
    sum(flops.values()),
    dtype,
    exact,
    times,
  )


def _taken(source: Instruction, users: _Computation) -> float:
  """Return how many bytes of an array its users read."""
  total = 0.0
  for user in users.values():
    if source.name not in user.operands:
      continue
    if user.opcode == "bitcast":
      total += _taken(user, users)
    elif user.opcode in _SLICING and user.operands[0] == source.name:
      total += user.bytes
    elif (
      user.opcode != "dynamic-update-slice" or user.operands[0] != source.name
    ):
      return source.bytes
  return min(total, source.bytes)


def _written(result: Instruction, computation: _Computation) -> float:
  """Return how many bytes of a result are written."""
  if result.opcode in ("bitcast", "tuple"):
    return sum(_written(computation[x], computation) for x in result.operands)
  if result.opcode == "dynamic-update-slice":
    return computation[result.operands[1]].bytes
  kind = result.opcode.removesuffix("-start")
  if kind in _COLLECTIVES and kind != result.opcode and kind != "all-reduce":
    # The type of such an instruction has the operands, too.
    return result.bytes - sum(computation[x].bytes for x in result.operands)
  return result.bytes


def _flops(instruction: Instruction, computation: _Computation) -> float:
  """Return the FLOPs of a product, an attention or a convolution, or 0."""
  target = instruction.target
  if instruction.opcode == "dot" or target.startswith("__cublas"):
    return _product_flops(instruction, computation)
  if target.startswith("__cudnn$fmha"):
    # Q K^T and P V; backwards Q K^T again and the gradients of four factors.
    query = _operand_shapes(instruction, computation)[0]
    images, tokens, heads, channels = query.dims
    products = 5 if target.endswith("Backward") else 2
    return products * 2 * images * heads * tokens**2 * channels
  if target.startswith("__cudnn$conv"):
    return _convolution_flops(instruction, computation)
  return 0.0


def _product_flops(instruction, computation):
  """2 m k n, times the batch."""
  contracted = re.search(
    r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([^\]}]*)[\]}]',
    instruction.attributes,
  ).group(1)
  left = computation[instruction.operands[0]].shapes[0].dims
  k = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
  return 2 * instruction.shapes[0].size * k


def _convolution_flops(instruction, computation):
  """2 x the size of the kernel x the positions that it is laid at."""
  left, right = _operand_shapes(instruction, computation)[:2]
  result = instruction.shapes[0]
  kernel, output = {
    "__cudnn$convBackwardFilter": (result, right),
    "__cudnn$convBackwardInput": (right, left),
  }.get(instruction.target, (right, result))
  labels = re.search(r"dim_labels=\S+?->(\w+)", instruction.attributes).group(1)
  return 2 * kernel.size * output.size / output.dims[labels.index("f")]


def count_kinds(kernels: Iterable[Kernel]) -> collections.Counter:
  """Return how often each kind of kernel runs."""
  counts: collections.Counter = collections.Counter()
  for kernel in kernels:
    counts[kernel.kind] += kernel.times
  return counts
