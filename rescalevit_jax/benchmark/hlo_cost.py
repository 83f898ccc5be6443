"""Count the bytes and the FLOPs of HLO instructions.

A sliced operand counts as its slices, an in-place result as its update.
"""

import math
import re

from rescalevit_jax.benchmark import hlo_parse

_SLICING = {"slice", "dynamic-slice", "gather"}
COLLECTIVES = {
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
}


def bytes_read(
  source: hlo_parse.Instruction, users: hlo_parse.Computation
) -> float:
  """Return the bytes of an array that its users read."""
  total = 0.0
  for user in users.values():
    if source.name not in user.operands:
      continue
    if user.opcode == "bitcast":
      total += bytes_read(user, users)
    elif user.opcode in _SLICING and user.operands[0] == source.name:
      total += user.bytes
    elif (
      user.opcode != "dynamic-update-slice" or user.operands[0] != source.name
    ):
      return source.bytes
  return min(total, source.bytes)


def bytes_written(
  result: hlo_parse.Instruction, computation: hlo_parse.Computation
) -> float:
  """Return the bytes of a result that are written."""
  if result.opcode in ("bitcast", "tuple"):
    return sum(
      bytes_written(computation[x], computation) for x in result.operands
    )
  if result.opcode == "dynamic-update-slice":
    return computation[result.operands[1]].bytes
  kind = result.kind
  if kind in COLLECTIVES and kind != result.opcode and kind != "all-reduce":
    # The type of an asynchronous collective includes the operands.
    return result.bytes - sum(computation[x].bytes for x in result.operands)
  return result.bytes


def flops(
  instruction: hlo_parse.Instruction, computation: hlo_parse.Computation
) -> float:
  """Return the FLOPs of a matrix product, attention or convolution, else 0."""
  target = instruction.target
  if instruction.opcode == "dot" or target.startswith("__cublas"):
    return _product_flops(instruction, computation)
  if target.startswith("__cudnn$fmha"):
    # Forward: Q K^T and P V. Backward: Q K^T again and four gradients.
    query = computation[instruction.operands[0]]
    images, tokens, heads, channels = query.shapes[0].dims
    products = 5 if target.endswith("Backward") else 2
    return products * 2 * images * heads * tokens**2 * channels
  if target.startswith("__cudnn$conv"):
    return _convolution_flops(instruction, computation)
  return 0.0


def _product_flops(instruction, computation):
  """Return 2 m k n, times the batch size."""
  contracted = re.search(
    r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([^\]}]*)[\]}]',
    instruction.attributes,
  ).group(1)
  left = computation[instruction.operands[0]].shapes[0].dims
  k = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
  return 2 * instruction.shapes[0].size * k


def _convolution_flops(instruction, computation):
  """Return 2 x kernel size x number of kernel positions."""
  left, right = (computation[x].shapes[0] for x in instruction.operands[:2])
  result = instruction.shapes[0]
  kernel, output = {
    "__cudnn$convBackwardFilter": (result, right),
    "__cudnn$convBackwardInput": (right, left),
  }.get(instruction.target, (right, result))
  labels = re.search(r"dim_labels=\S+?->(\w+)", instruction.attributes).group(1)
  return 2 * kernel.size * output.size / output.dims[labels.index("f")]
