"""Decode bytes from hypothesis or atheris into decisions."""

from collections.abc import Sequence
import struct
from typing import Any

# Sizes and counts that overflow, wrap around or have special meanings.
NUMBERS = (
  *(0, 1, 2, 3, 7, 8, 16, 255, 256, 4096, 32_767, 65_535, 65_536, 100_000),
  *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1),
)


class Choices:
  """Reads decisions from bytes; all are 0 after the last byte."""

  def __init__(self, data: bytes):
    self._data = data
    self._at = 0

  def __bool__(self) -> bool:
    return self._at < len(self._data)

  def below(self, count: int) -> int:
    """Return an integer from 0 to `count` - 1."""
    size = (max(count - 1, 1).bit_length() + 7) // 8
    return int.from_bytes(self.blob(size), "little") % count

  def pick(self, options: Sequence[Any]) -> Any:
    return options[self.below(len(options))]

  def number(self) -> int:
    """Return an edge case or any 32-bit number."""
    return self.pick(NUMBERS) if self.below(3) else self.below(2**32)

  def blob(self, size: int) -> bytes:
    blob = self._data[self._at : self._at + size]
    self._at += size
    return blob

  def word(self) -> bytes:
    return self.blob(self.below(20))


def edit(content: bytes, choices: Choices) -> bytes:
  """Change, insert or delete bytes at any position."""
  content = bytearray(content)
  where = choices.below(len(content) + 1)
  kind = choices.below(7)
  if kind == 0:
    content[where : where + 1] = choices.blob(1)
  elif kind < 3:
    layout = choices.pick("BHIQ"), choices.pick("<>")
    number = struct.pack("<Q", choices.number() & (2**64 - 1))
    size = struct.calcsize(layout[0])
    number = number[:size] if layout[1] == "<" else number[:size][::-1]
    content[where : where + size] = number
  elif kind == 3:
    del content[where : where + choices.below(64)]
  elif kind == 4:
    content[where:where] = choices.word()
  elif kind == 5:
    other = choices.below(len(content) + 1)
    content[where:where] = content[other : other + choices.below(256)]
  else:
    del content[where:]
  return bytes(content)
