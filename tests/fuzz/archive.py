"""Archives of CIFAR for rescalevit_jax.data.untrusted_archive."""

import dataclasses
import gzip
import pathlib
import tarfile

from fuzz import choices as choices_lib
from rescalevit_jax.data import untrusted_archive

# The official layouts, with one image per file.
_LAYOUTS = tuple(
  dataclasses.replace(layout, records=dict.fromkeys(layout.records, 1))
  for layout in untrusted_archive.LAYOUTS
)
# Start and end of each field of a tar header.
_FIELDS = {
  "name": (0, 100),
  "mode": (100, 108),
  "uid": (108, 116),
  "size": (124, 136),
  "mtime": (136, 148),
  "sum": (148, 156),
  "type": (156, 157),
  "linkname": (157, 257),
  "magic": (257, 265),
  "device": (329, 345),
  "prefix": (345, 500),
  "sparse": (386, 500),
}
_TYPES = b"\x000123456 7SLKxgXVMNAD"
_NAMES = (
  *(b"../../x", b"/etc/passwd", b"", b".", b"..", b"\xff\xfe", b"a\nb", b"/"),
  *(b"cifar-10-batches-bin", b"cifar-10-batches-bin/", b"cifar-100-binary/x"),
  *(b"cifar-10-batches-bin/../x", b"cifar-10-batches-bin//test_batch.bin"),
)
_PAX = (
  *(b"path", b"linkpath", b"size", b"mtime", b"uid", b"hdrcharset", b"charset"),
  *(b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.map", b"comment"),
  *(b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.name"),
  *(b"GNU.sparse.offset", b"GNU.sparse.numbytes", b"GNU.sparse.numblocks"),
)
_VALUES = (
  *(b"0", b"1", b"-1", b"3073", b"3074", b"9" * 30, b"9" * 5000, b"1e9", b""),
  *(b"nan", b"inf", b"BINARY", b"\xff", b"0,3073", b"5,1,0,9", b"0,0,0,0"),
  *(b"1,", b"-5,10", b"99999999999,1", b"ISO-IR 10646 2000 UTF-8"),
)


def _header(name, size):
  info = tarfile.TarInfo(name)
  info.size = size
  return info.tobuf(tarfile.USTAR_FORMAT)


def _good(layout):
  contents = {
    name: b"".join(b"class%d\n" % i for i in range(count))
    for name, count in layout.names.items()
  }
  contents |= {name: bytes(layout.record_bytes) for name in layout.records}
  contents |= {name: b"<html>" for name in layout.optional}
  return tuple(
    (_header(f"{layout.folder}/{name}", len(content)), content)
    for name, content in contents.items()
  )


_GOOD = tuple(map(_good, _LAYOUTS))


def build(choices: choices_lib.Choices) -> bytes:
  """Return a gzip-compressed tar file."""
  members = [[bytearray(h), c] for h, c in choices.pick(_GOOD)]
  end = bytes(1024)
  while choices:
    kind = choices.below(9)
    where = choices.below(len(members) + 1)
    if kind == 0:
      break
    if kind == 1:
      members.insert(where, _extension(choices))
    elif kind == 2:
      end = choices.pick((b"", b"x", end + b"x", bytes(choices.below(1 << 20))))
    elif where == len(members):
      continue
    elif kind == 3:
      del members[where]
    elif kind == 4:
      members.insert(where, [bytearray(members[where][0]), members[where][1]])
    elif kind == 5:
      members[where][1] = choices_lib.edit(members[where][1], choices)
    else:
      _change(members[where][0], choices)
  tar = b"".join(
    part
    for header, content in members
    for part in (header, content, bytes(-len(content) % 512))
  )
  tar += end
  if choices and choices.below(2):
    while choices:
      tar = choices_lib.edit(tar, choices)
  packed = gzip.compress(tar, 1 if len(tar) > 1 << 17 else 0, mtime=0)
  while choices:
    kind = choices.below(4)
    if kind == 0:  # A file name or other optional fields of gzip's header.
      packed = bytearray(packed.ljust(10, b"\0"))
      packed[3] = choices.below(64)
      packed[10:10] = choices.word()
      packed = bytes(packed)
    elif kind == 1:
      packed += gzip.compress(choices.word())
    else:
      packed = choices_lib.edit(packed, choices)
  return packed


def _change(header, choices):
  """Change a header, usually with a correct checksum."""
  field = choices.pick(list(_FIELDS))
  start, end = _FIELDS[field]
  if field == "type":
    value = bytes([choices.pick(_TYPES)])
  elif field in ("name", "linkname", "prefix"):
    value = choices.pick((*_NAMES, choices.word(), b"x" * 100))
  else:
    number = choices.number()
    sign = choices.pick((b"\x80", b"\xff"))
    value = choices.pick(
      (
        b"%o\0" % number,
        b"-%o" % number,
        sign + (number % 256 ** (end - start - 1)).to_bytes(end - start - 1),
        choices.word(),
      )
    )
  header[start:end] = value[: end - start].ljust(end - start, b"\0")
  if field != "sum":
    (header[148:156]) = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def _extension(choices):
  """Return a header with more fields of the next member."""
  kind = choices.pick(b"xgXLKxS")
  if kind in b"LK":
    content = choices.pick(_NAMES) * choices.pick((1, 1, 1000, 20_000))
  else:
    records = []
    for _ in range(1 + choices.below(8)):
      record = b" %b=%b\n" % (
        choices.pick((*_PAX, choices.word())),
        choices.pick((*_VALUES, choices.word())),
      )
      size = len(record) + 2
      size += len(str(size)) - 2
      records.append(b"%d" % size + record)
    content = b"".join(records) * choices.pick((1, 1, 1, 5000))
    content = content[: 1 << 20]
  header = bytearray(_header("x", len(content)))
  header[156] = kind
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  if not choices.below(4):
    _change(header, choices)
  return [header, content]


def run(path: pathlib.Path) -> None:
  untrusted_archive.check(str(path), _LAYOUTS)
