"""Parse optimized HLO into instructions."""

import dataclasses
import math
import re

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
    return self.size * int(re.findall(r"\d+", self.dtype)[0]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str  # Unique in its computation.
  opcode: str  # Such as 'fusion'.
  type: str  # Of the result, as written.
  shapes: tuple[Shape, ...]  # Of the result's arrays.
  operands: tuple[str, ...]  # Their names.
  attributes: str  # Text after the operands.
  is_root: bool  # True for the result of its computation.

  @property
  def kind(self) -> str:
    """Opcode without the suffix '-start'."""
    return self.opcode.removesuffix("-start")

  @property
  def target(self) -> str:
    """Target of a custom call, or ''."""
    return self._attribute("custom_call_target")

  @property
  def op_name(self) -> str:
    """Path of the module that created it."""
    return self._attribute("op_name")

  @property
  def called(self) -> list[str]:
    """Names of the called computations."""
    branches = _BRANCHES.search(self.attributes)
    found = _NAME.findall(branches.group(1)) if branches else []
    return _CALLED.findall(self.attributes) + found

  @property
  def bytes(self) -> float:
    """Size of the result, without a library's workspace."""
    shapes = self.shapes
    if self.opcode == "custom-call" and len(shapes) > 1:
      if shapes[-1].dtype in ("s8", "u8"):
        shapes = shapes[:-1]
    return sum(shape.bytes for shape in shapes)

  def _attribute(self, name):
    found = re.search(rf'{name}="([^"]*)"', self.attributes)
    return found.group(1) if found else ""


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Return the instructions by computation and name, and the entry's name."""
  computations: dict[str, Computation] = {}
  current: Computation = {}
  entry = ""
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations[header.group(2)] = {}
      if header.group(1):
        entry = header.group(2)
    elif match := _INSTRUCTION.match(line):
      root, name, kind, opcode, rest = match.groups()
      operands, attributes = _split_operands(rest)
      current[name] = Instruction(
        name,
        opcode,
        kind,
        _shapes(kind),
        tuple(_NAME.findall(operands)),
        attributes,
        bool(root),
      )
  return computations, entry


def _split_operands(text):
  """Split the text at the closing parenthesis."""
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
