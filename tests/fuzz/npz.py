"""Checkpoint files for the loader of weights."""

import dataclasses
import io
import pathlib
import struct
import zlib

import numpy as np
import trees

from fuzz import choices as choices_lib
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import untrusted_npz

_SIZES = dict(num_layers=1, hidden_size=4, mlp_dim=4)
_MODEL = trees.fresh("BN", **_SIZES)
_SLACK = 1 << 24  # Replaces untrusted_npz.SLACK.
_FIELDS = dict(
  version=2, flags=2, method=2, time=4, crc=4, packed=4, size=4, extra=2
)
_DESCRS = (
  *("'<f4'", "'>f4'", "'<f8'", "'<f2'", "'<i4'", "'|u1'", "'<V2'", "'|V2'"),
  *("'|O'", "'O'", "'<U4'", "'|S0'", "'V0'", "'<M8'", "'?'", "'<c8'", "'f16'"),
  *("'f4,f4'", "'(9,9)f4'", "'(99999,99999)f4'", "[('a','<f4')]", "[('','O')]"),
  *("[('a','V2',(2,2))]", "None", "4", "'<f4' * 9", "((((('f4')))))", "{}"),
  *("[[[[]]]]", "'<f9999999999'", "'|V2147483647'", "'<V4294967296'", "object"),
)
_SHAPES = (
  *("()", "(0,)", "(1,)", "(-1,)", "(-1,-4)", "(True,)", "(4,)", "(1,1,4)"),
  *("(2**70,)", "(99999999999999999999,)", "(4294967296,4294967296)", "[4]"),
  *("(9223372036854775807,2)", "(0,9223372036854775807)", "(1.0,)", "None"),
  *("(" + "1," * 70 + ")", "(" * 99, "-" * 999 + "1", "(9" + "0" * 5000 + ",)"),
)


@dataclasses.dataclass
class Member:
  """A file of a zip archive, with its headers."""

  name: bytes
  content: bytes
  # Wrong values by field, in the local and the central header.
  lies: tuple[dict[str, int], dict[str, int]]
  offset: int | None = None

  def packed(self) -> bytes:
    method = self.lies[1].get("method", 0)
    if method != 8:
      return self.content
    packer = zlib.compressobj(1, wbits=-15)
    return packer.compress(self.content) + packer.flush()


def _npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


_GOOD = tuple(
  {f"{k}.npy".encode(): _npy(v) for k, v in trees.arrays(n, **_SIZES).items()}
  for n in ("BN", "LN")
)
_PREFIXES = (b"params/", b"opt/target/", b"opt/state/", b"batch_stats/", b"\0")


def build(choices: choices_lib.Choices) -> bytes:
  """Return a zip archive."""
  good = choices.pick(_GOOD)
  members = [Member(k, v, ({}, {})) for k, v in good.items()]
  end = {"count": len(members)}
  while choices:
    kind = choices.below(12)
    member = choices.pick(members) if members else None
    if kind == 0:
      break
    if kind == 1:
      end[choices.pick(("count", "size", "offset", "comment"))] = (
        choices.number()
      )
    elif member is None:
      continue
    elif kind == 2:
      lies = choices.pick(member.lies)
      lies[choices.pick(list(_FIELDS))] = choices.number()
    elif kind == 3:  # A valid or invalid compression method.
      for lies in member.lies:
        lies["method"] = choices.pick((8, 12, 14, 93, 1))
    elif kind == 4:
      member.offset = choices.number()
    elif kind == 5:
      _rename(member, choices, good)
    elif kind == 6:
      members.remove(member)
    elif kind == 7:
      members.append(dataclasses.replace(member))
    elif kind == 8:
      member.content = choices_lib.edit(member.content, choices)
    elif kind == 9:  # A decompression bomb.
      member.content += bytes(choices.below(1 << 18))
      for lies in member.lies:
        lies["method"] = 8
    else:
      member.content = _header(choices) + member.content[128:]
  content = _zip(members, end)
  while choices:
    content = choices_lib.edit(content, choices)
  return content


def _rename(member, choices, good):
  kind = choices.below(5)
  if kind == 0:
    member.name = choices.word()
  elif kind == 1:
    member.name = choices.pick(_PREFIXES) + member.name
  elif kind == 2:
    member.name = choices.pick(list(good))
  elif kind == 3:
    member.name = choices_lib.edit(member.name, choices)
  else:
    number = str(choices.number()).encode()
    member.name = member.name.replace(b"block_0", b"block_" + number)


def _header(choices):
  """Return the start of an .npy file, usually 128 bytes."""
  text = (
    f"{{'descr': {choices.pick(_DESCRS)}, 'fortran_order':"
    f" {choices.pick(('False', 'True', '1', 'None'))},"
    f" 'shape': {choices.pick(_SHAPES)}, }}"
  ).encode()
  if not choices.below(4):
    text = choices_lib.edit(text, choices)
  text = text.ljust(117) + b"\n"
  version = choices.pick(((1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 0)))
  size = len(text) if choices.below(4) else choices.number()
  long = version in ((2, 0), (3, 0))
  packed = (
    struct.pack("<I", size % 2**32) if long else struct.pack("<H", size % 2**16)
  )
  return b"\x93NUMPY" + bytes(version) + packed + text


def _zip(members, end):
  """Return the archive; `end` has the fields of its end record."""
  body, directory = [], []
  at = 0
  for member in members:
    packed = member.packed()
    true = dict(
      version=20,
      flags=0,
      method=0,
      time=0,
      crc=zlib.crc32(member.content),
      packed=len(packed),
      size=len(member.content),
      extra=0,
    )
    headers = []
    for lies in member.lies:
      values = {k: v % 256 ** _FIELDS[k] for k, v in (true | lies).items()}
      name = member.name[:65_535]
      headers.append(
        struct.pack(
          "<HHHLLLLHH",
          *list(values.values())[:-1],
          len(name),
          values["extra"],
        )
      )
    local = b"PK\3\4" + headers[0] + name
    offset = (at if member.offset is None else member.offset) % 2**32
    directory.append(
      b"PK\1\2\x14\0" + headers[1] + struct.pack("<HHHLL", 0, 0, 0, 0, offset)
    )
    directory.append(name)
    body += [local, packed]
    at += len(local) + len(packed)
  directory = b"".join(directory)
  said = {"size": len(directory), "offset": at, "comment": 0} | end
  return b"".join(
    (
      *body,
      directory,
      b"PK\5\6\0\0\0\0",
      struct.pack("<H", said["count"] % 2**16) * 2,
      struct.pack("<LL", said["size"] % 2**32, said["offset"] % 2**32),
      struct.pack("<H", said["comment"] % 2**16),
    )
  )


def run(path: pathlib.Path) -> None:
  slack, untrusted_npz.SLACK = untrusted_npz.SLACK, _SLACK
  try:
    _, _, report = load.load(path, *_MODEL)
    report.summary()
  finally:
    untrusted_npz.SLACK = slack
