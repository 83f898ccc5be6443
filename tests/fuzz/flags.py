"""Command lines of the main program, and the config.json of a run.

A config file may run any code, so it is not fuzzed.
"""

import contextlib
import io
import json
import os
import pathlib
import sys

from absl import flags
import paths

from fuzz import choices as choices_lib
from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax import main
from rescalevit_jax.config import keys
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runtime import cli

_CONFIG = b"--config=" + os.fsencode(paths.ROOT / "configs" / "quickstart.py")
_RUN = b"--workdir=RUN"
_JSON = config_lib.to_json(config_lib.default()).encode()
_KEYS = (
  *(key.encode() for key in keys.KEYS),
  *(b"model", b"augment", b"model.norm.x", b"", b".", b"seed.x", b"__class__"),
  *(b"get", b"model.get", b"_fields", b"update", b"dataset ", b"model..norm"),
)
_VALUES = (
  *(
    b"",
    b"0",
    b"1",
    b"-1",
    b"None",
    b"none",
    b"True",
    b"false",
    b"1e9",
    b"nan",
  ),
  *(
    b"inf",
    b"-inf",
    b"1e999",
    b"1_000",
    b"0x10",
    b"1.5",
    b"9" * 30,
    b"9" * 5000,
  ),
  *(b"LN", b"BN", b"ViT-B_16", b"ViT-Ti_16", b"cosine", b"'a'", b"[1]", b"{}"),
  *(b"(1,)", b"lambda: 0", b"..", b"../../x", b"/", b"a\nb", b"\xff", b"a=b"),
  *(
    b"Traceback\n",
    b"x" * 5000,
    "٣".encode(),
    "²".encode(),
    b" 7 ",
    b"float32",
  ),
)
_FLAGS = (
  *(b"--mode=train", b"--mode=eval", b"--mode=", b"--mode", b"--nomode"),
  *(b"--workdir=", b"--workdir", b"--workdir=/nonexistent", _RUN, b"--", b"-"),
  *(b"--help", b"--helpfull", b"--helpxml", b"-?", b"--config", b"--config="),
  *(b"--noconfig", b"--config=:", b"--undefok=x", b"--undefok", b"stray"),
  *(b"--verbosity=9", b"-v=x", b"--log_dir=/nonexistent", b"--only_check_args"),
  *(b"--config=/nonexistent.py", b"--config=None", _CONFIG + b":args", _CONFIG),
)


def build(choices: choices_lib.Choices) -> bytes:
  """Return a config.json and the arguments, separated by zero bytes."""
  args = [choices.pick((_CONFIG, _CONFIG, _CONFIG, _RUN, b"--mode=train"))]
  text = _JSON
  while choices:
    kind = choices.below(6)
    if kind == 0:
      text = _json(text, choices)
    elif kind == 1:
      arg = choices.pick(_FLAGS)
      args.insert(choices.below(len(args) + 1), arg)
    elif kind == 2:
      args[choices.below(len(args))] = choices_lib.edit(args[-1], choices)
    else:
      dashes = choices.pick((b"--config.",) * 5 + (b"-config.", b"--noconfig."))
      equals = choices.pick((b"=", b"=", b"=", b"", b"==", b"\0"))
      value = choices.pick(_VALUES) if choices.below(4) else choices.word()
      args.append(dashes + choices.pick(_KEYS) + equals + value)
  return b"\0".join((text.replace(b"\0", b""), *args))


def _json(text, choices):
  kind = choices.below(4)
  if kind == 0:
    return choices_lib.edit(text, choices)
  if kind == 1:
    depth = choices.pick((1, 100, 100_000))
    return choices.pick((b"[", b'{"a":')) * depth
  name, value = choices.pick(_KEYS), choices.pick(_VALUES)
  leaf = name.rpartition(b".")[2]
  if kind == 2:
    value = json.dumps(value.decode(errors="replace")).encode()
  before, found, rest = text.partition(b'"%b": ' % leaf)
  return before + found + value + rest[rest.find(b",") :] if found else text


def run(path: pathlib.Path) -> None:
  text, *args = path.read_bytes().split(b"\0")
  folder = path.parent / "run"
  if _RUN in args:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(text)
  args = [
    os.fsdecode(arg.replace(b"RUN", bytes(folder)) if arg == _RUN else arg)
    for arg in args
    if not arg.lstrip(b"-").startswith(b"flagfile")  # It may not terminate.
  ]
  argv, fail = sys.argv, cli.fail
  sys.argv, cli.fail = ["main.py", *args], _fail
  flags.FLAGS.unparse_flags()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      config = main.parse(sys.argv)
  except SystemExit as e:
    assert e.code == 0
    return
  finally:
    sys.argv, cli.fail = argv, fail
  try:
    config_lib.validate(config)
  except errors.UserError as e:
    raise AssertionError("a config that is not valid") from e
  again = config_lib.from_json(config_lib.to_json(config))
  assert config_lib.flatten(again) == config_lib.flatten(config)
  workdir = folder_lib.default_workdir(config)
  assert workdir.parent == pathlib.Path("runs") and workdir.name != ".."


def _fail(message, code):
  assert code == 2
  # The message may quote arguments of any length.
  raise errors.UserError(" ".join(message.split())[:1000])
