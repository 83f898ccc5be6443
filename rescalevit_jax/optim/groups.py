"""Groups of parameters, and their factors of learning rate and weight decay.

A table of factors is a text `PATTERN:FACTOR PATTERN:FACTOR ...`. A pattern is a
shell pattern of the parameter's name, such as `head/*` or `*/encoderblock_0/*`,
or one of `GROUPS`. The first matching pattern applies, as in big_vision's
`config.lr_mults`.
"""

from collections.abc import Callable
import fnmatch
import math
from typing import Any

import jax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from rescalevit_jax import errors
from rescalevit_jax.optim import kernels

Table = tuple[tuple[str, float], ...]

GROUPS: dict[str, Callable[[KeyPath, Any], bool]] = {
  "kernels": lambda path, x: kernels.is_kernel(path),
  "scalars": lambda path, x: x.size == 1,
}


def parse(text: str | None) -> Table:
  """Parse a text into pairs of pattern and factor; None gives no pairs.

  Raises:
    ValueError: the text has another form, or a factor is negative or infinite.
  """
  table = []
  for entry in (text or "").split():
    pattern, colon, factor = entry.rpartition(":")
    if not (colon and pattern and 0 <= float(factor) < math.inf):
      raise ValueError(entry)
    table.append((pattern, float(factor)))
  return tuple(table)


def is_table(text: str) -> bool:
  """Return whether a text is a table with at least one entry."""
  try:
    return bool(parse(text))
  except ValueError:
    return False


def factors(
  table: Table, params: PyTree[jax.Array], default: float = 1.0
) -> PyTree[float]:
  """Return the factor of each parameter; `default` where no pattern matches."""

  def factor(path, x):
    found = (number for pattern, number in table if _matches(pattern, path, x))
    return next(found, default)

  return jax.tree.map_with_path(factor, params)


def freeze(table: Table, params: PyTree[jax.Array]) -> PyTree[jax.Array]:
  """Stop the gradients of parameters with factor 0.

  They are then exactly 0. They count neither in the gradient's norm nor in its
  clipping, and XLA does not compute them.
  """
  return jax.tree.map(
    lambda x, factor: x if factor else jax.lax.stop_gradient(x),
    params,
    factors(table, params),
  )


def check(key: str, table: Table, params: PyTree[jax.Array]) -> None:
  """Raise UserError if a pattern matches no parameter; a group may be empty."""
  leaves = jax.tree.leaves_with_path(params)
  for pattern, _ in table:
    if pattern in GROUPS:
      continue
    if not any(_matches(pattern, path, x) for path, x in leaves):
      near = errors.nearest(pattern, [*GROUPS, *(_name(p) for p, _ in leaves)])
      raise errors.UserError(f"config: {key}: no parameter {pattern!r}; {near}")


def num_layers(params: Any) -> int:
  """Return the number of encoder blocks L of a tree like the parameters."""
  return sum(name.startswith("encoderblock_") for name in params["Transformer"])


def layer(path: KeyPath, num_layers: int) -> int:
  """Return the layer of a parameter.

  The embedding, with class token and positions, is 0; `encoderblock_0` is 1;
  everything after the blocks is L + 1.
  """
  name = path[1].key if path[0].key == "Transformer" else path[0].key
  if name.startswith("encoderblock_"):
    return 1 + int(name.removeprefix("encoderblock_"))
  after = name in ("encoder_norm", "pre_logits", "head")
  return num_layers + 1 if after else 0


def _matches(pattern, path, x):
  if pattern in GROUPS:
    return GROUPS[pattern](path, x)
  return fnmatch.fnmatchcase(_name(path), pattern)


def _name(path):
  return "/".join(key.key for key in path)
