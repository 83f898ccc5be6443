"""Framing of records in TFRecord files."""

import struct


def crc32c(data):
  """Compute the checksum bit by bit from the polynomial."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(crc):
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record):
  length = struct.pack("<Q", len(record))
  return b"".join(
    (
      length,
      struct.pack("<I", masked(crc32c(length))),
      record,
      struct.pack("<I", masked(crc32c(record))),
    )
  )
