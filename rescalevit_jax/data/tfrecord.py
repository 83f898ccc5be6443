"""Reads TFRecord files without TensorFlow.

So a prepared data set gives the same arrays in either of tfds' file formats,
from the same decoder, on a machine without TensorFlow too.
"""

from collections.abc import Iterator
import functools
import os
import struct

import numpy as np

# A record: length (8 bytes), checksum of the length (4), data, checksum of the
# data (4); all little-endian.
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_BATCH = 1024  # Records whose checksums are computed together.


def read(path: str | os.PathLike[str]) -> Iterator[memoryview]:
  """Yields the records of a TFRecord file in their order.

  Args:
    path: of the file.

  Raises:
    ValueError: the file is cut off or a checksum does not fit.
    OSError: it cannot be read.
  """
  with open(path, "rb") as f:
    file = memoryview(f.read())
  records, checksums = [], []
  offset = 0
  while offset < len(file):
    start = offset + _HEADER.size
    if start > len(file):
      raise ValueError(f"cut off at byte {offset}")
    length, _ = _HEADER.unpack_from(file, offset)
    offset = start + length + _FOOTER.size
    if offset > len(file):
      raise ValueError(f"cut off in the record at byte {start}")
    records.append(file[start : start + length])
    checksums.append(_FOOTER.unpack_from(file, start + length)[0])
  for i in range(0, len(records), _BATCH):
    batch = records[i : i + _BATCH]
    if (masked_crc32c(batch) != checksums[i : i + _BATCH]).any():
      raise ValueError(f"wrong checksum in records {i} to {i + len(batch) - 1}")
    yield from batch


def masked_crc32c(records: list[memoryview]) -> np.ndarray:
  """Returns the TFRecord checksums of records, uint32 [len(records)].

  Args:
    records: of at least 4 bytes each, as all serialised examples have.
  """
  # All records at once, two bytes at a time. They are aligned at their ends:
  # zeros ahead of a record leave a state of 0 as it is.
  width = -(-max(map(len, records)) // 2) * 2
  rows = np.zeros((len(records), width), np.uint8)
  for row, record in zip(rows, records, strict=True):
    if len(record) < 4:
      raise ValueError(f"a record of {len(record)} bytes")
    start = width - len(record)
    row[start:] = record
    # The same as starting with a state of ones.
    row[start : start + 4] ^= 0xFF
  table = _table()
  crc = np.zeros(len(records), np.uint32)
  for words in np.ascontiguousarray(rows.view("<u2").T):
    crc = table[(crc ^ words) & 0xFFFF] ^ (crc >> 16)
  crc = ~crc
  return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


@functools.cache
def _table() -> np.ndarray:
  """CRC-32C (Castagnoli, reflected) of every two bytes, uint32 [65536]."""
  crc = np.arange(1 << 16, dtype=np.uint32)
  for _ in range(16):
    crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1)
  return crc
