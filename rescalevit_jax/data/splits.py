"""Resolve splits in tfds' notation to ranges of examples."""

from collections.abc import Mapping
import re
from typing import NamedTuple

import tensorflow_datasets as tfds

from rescalevit_jax import errors


class Part(NamedTuple):
  """Consecutive examples of a stored split."""

  split: str
  indices: range


def resolve(
  notation: str, sizes: Mapping[str, int], key: str, name: str
) -> list[Part]:
  """Resolve a split in tfds' notation, such as "train[:10%]" or "a+b".

  Args:
    notation: the split.
    sizes: number of examples of each stored split.
    key: config key of the notation, for errors.
    name: name of the dataset, for errors.
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
    Part(x.splitname, range(sizes[x.splitname])[x.from_ : x.to])
    for x in absolute
  ]
  parts = [part for part in parts if part.indices]
  if not parts:
    raise errors.UserError(
      f"config: {key} ({notation}) selects no example of {name}; select more"
    )
  return parts
