"""Resolve splits in tfds' notation to ranges of examples."""

from collections.abc import Mapping
import dataclasses
import re

import tensorflow_datasets as tfds

from rescalevit_jax import errors


@dataclasses.dataclass(frozen=True)
class Part:
  """Consecutive examples of a stored split.

  Attributes:
    split: name of the stored split.
    start: index of the first example.
    stop: index after the last one.
  """

  split: str
  start: int
  stop: int

  def __len__(self) -> int:
    return self.stop - self.start


def resolve(
  notation: str, sizes: Mapping[str, int], key: str, name: str
) -> list[Part]:
  """Resolve a split such as "train[:10%]" or "train+validation".

  Args:
    notation: the split, in tfds' notation.
    sizes: number of examples of each stored split.
    key: config key of the notation, for errors.
    name: name of the dataset, for errors.

  Raises:
    UserError: the notation is invalid, or it selects no example.
  """
  if re.search(r"\dshard", notation):  # Each split would count as one shard.
    raise errors.UserError(
      f"config: {key} ({notation}): parts are in percent or examples, not in"
      " shards; use a part such as train[:10%]"
    )
  try:
    instruction = tfds.core.ReadInstruction.from_spec(notation)
    absolute = instruction.to_absolute(
      {
        split: tfds.core.SplitInfo(
          name=split, shard_lengths=[size], num_bytes=0
        )
        for split, size in sizes.items()
      }
    )
  except Exception as e:  # tfds raises several types.
    raise errors.UserError(
      f"config: {key} ({notation}) is not a split of {name}, which has"
      f" {', '.join(sizes) or 'none'}; use one of them, or a part such as"
      " train[:10%]"
    ) from e
  parts = [
    Part(x.splitname, start, stop)
    for x in absolute
    for start in [x.from_ or 0]
    for stop in [sizes[x.splitname] if x.to is None else x.to]
    if start < stop
  ]
  if not parts:
    raise errors.UserError(
      f"config: {key} ({notation}) selects no example of {name}; select more"
    )
  return parts
