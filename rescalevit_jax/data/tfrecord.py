"""Read TFRecord files without TensorFlow.

Both file formats of tfds are decoded by the same code and give the same arrays,
also on a machine without TensorFlow.
"""

from collections.abc import Iterator
import functools
import os
import struct

from jaxtyping import UInt32
import numpy as np

# A record: length (8 bytes), checksum of the length (4), data, checksum of the
# data (4); all little-endian.
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_BATCH_BYTES = 1 << 24  # Of records whose checksums are computed together.


def read(path: str | os.PathLike[str]) -> Iterator[memoryview]:
  """Yield a TFRecord file's records; raise ValueError if it is damaged."""
  with open(path, "rb") as f:
    file = memoryview(f.read())
  records, checksums = [], []
  offset = 0
  while offset < len(file):
    start = offset + _HEADER.size
    if start > len(file):
      raise ValueError(f"truncated at byte {offset}")
    length, _ = _HEADER.unpack_from(file, offset)
    offset = start + length + _FOOTER.size
    if offset > len(file):
      raise ValueError(f"truncated in the record at byte {start}")
    records.append(file[start : start + length])
    checksums.append(_FOOTER.unpack_from(file, start + length)[0])
  for part in _batches(records):
    if (masked_crc32c(records[part]) != checksums[part]).any():
      raise ValueError(
        f"wrong checksum in records {part.start} to {part.stop - 1}"
      )
    yield from records[part]


def _batches(records):
  """Yield slices of records of at most _BATCH_BYTES after padding."""
  start = longest = 0
  for i, record in enumerate(records):
    longest = max(longest, len(record))
    if i > start and (i + 1 - start) * longest > _BATCH_BYTES:
      yield slice(start, i)
      start, longest = i, len(record)
  if records:
    yield slice(start, len(records))


def masked_crc32c(records: list[memoryview]) -> UInt32[np.ndarray, " N"]:
  """Return the TFRecord checksums of records of at least 4 bytes each."""
  # All records are processed at once, two bytes at a time. They are aligned at
  # their ends: leading zeros leave a state of 0 unchanged.
  width = -(-max(map(len, records)) // 2) * 2
  rows = np.zeros((len(records), width), np.uint8)
  for row, record in zip(rows, records, strict=True):
    if len(record) < 4:
      raise ValueError(f"a record of {len(record)} bytes")
    start = width - len(record)
    row[start:] = record
    # Equivalent to an initial state of ones.
    row[start : start + 4] ^= 0xFF
  table = _table()
  crc = np.zeros(len(records), np.uint32)
  for words in np.ascontiguousarray(rows.view("<u2").T):
    crc = table[(crc ^ words) & 0xFFFF] ^ (crc >> 16)
  crc = ~crc
  return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


@functools.cache
def _table():
  """Return the CRC-32C (Castagnoli, reflected) of every two bytes."""
  crc = np.arange(1 << 16, dtype=np.uint32)
  for _ in range(16):
    crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1)
  return crc
