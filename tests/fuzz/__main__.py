r"""Try millions of hostile inputs; the test suite tries a few hundred.

  python tests/fuzz --inputs=1000000
  python tests/fuzz --again=npz-finding

With atheris (the extra `fuzz`), code coverage guides the search; otherwise,
error messages do. judge.py defines the allowed outcomes. After any other
outcome, the input is kept in a file and the exit code is 1.
"""

import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

try:
  import atheris
except ImportError:
  atheris = None

_TARGETS = ("npz", "archive", "image", "flags")
_LONGEST = 256  # Maximum bytes of choices.
_SLOW = 1.0  # Keep an input that takes more seconds.
_HANGS = 300.0  # Timeout in seconds for 100 inputs.
_BYTES = 256 << 20  # Allowed growth of memory.
_WARM_UP = 200
# Modules whose coverage guides atheris.
_GUIDES = (
  *("rescalevit_jax", "prepare_data", "numpy.lib", "zipfile", "tarfile"),
  *("gzip", "PIL", "absl.flags", "ml_collections", "json"),
)


def main(argv: Sequence[str] | None = None) -> int:
  """Fuzz all targets; return the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--inputs", type=int, default=1_000_000, metavar="N")
  parser.add_argument(
    "--target", choices=_TARGETS, help="one of them; default: all, in turn"
  )
  parser.add_argument("--jobs", type=int, default=2, help="at a time")
  parser.add_argument(
    "--unguided", action="store_true", help="without atheris, and faster so"
  )
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument(
    "--again", type=pathlib.Path, metavar="FILE", help="a kept file, once more"
  )
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.again:
    return _again(args.again)
  if args.worker:
    folder = pathlib.Path(args.worker)
    guided = atheris is not None and not args.unguided
    _work(args.target, args.inputs, args.seed, folder, guided)
  targets = [args.target] if args.target else _TARGETS
  count = -(-args.inputs // len(targets))
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    options = [f"--inputs={count}", f"--seed={args.seed}"]
    options += ["--unguided"] * args.unguided
    results = list(pool.map(lambda t: _start(t, options), targets))
  done = [result for result in results if result]
  print(f"{sum(r['inputs'] for r in done):,} inputs in all")
  return 0 if len(done) == len(targets) else 1


def _start(target: str, options: Sequence[str]) -> dict | None:
  """Fuzz a target in a subprocess; return None after a finding."""
  memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
  with tempfile.TemporaryDirectory(dir=memory) as folder:
    command = [sys.executable, os.path.dirname(__file__), "--worker", folder]
    command += [f"--target={target}", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    # libtiff and libFuzzer print a lot.
    with open(f"{folder}/stderr", "wb") as log:
      done = subprocess.run(command, stderr=log, env=environment, check=False)
    if done.returncode == 0:
      result = json.loads(pathlib.Path(folder, "result").read_text())
      if result["longest"] > _SLOW:
        shutil.copy(f"{folder}/slowest", f"{target}-slowest")
      return result
    kept = f"{target}-finding"
    with contextlib.suppress(FileNotFoundError):  # No input yet.
      shutil.copy(f"{folder}/input", kept)
    said = pathlib.Path(folder, "stderr").read_text(errors="replace")
    print(f"{target}: exit code {done.returncode}, see {kept}\n{said[-3000:]}")
    return None


def _again(path):
  target, judge, _ = _modules(path.name.partition("-")[0])
  with tempfile.TemporaryDirectory() as folder:
    print(judge.judge(target, path.read_bytes(), pathlib.Path(folder)))
  return 0


def _modules(target):
  tests = pathlib.Path(__file__).parents[1]
  sys.path[:1] = [str(tests), str(tests / "helpers")]
  names = (target, "judge", "choices")
  return tuple(importlib.import_module(f"fuzz.{name}") for name in names)


def _work(
  name: str, inputs: int, seed: int, folder: pathlib.Path, guided: bool
) -> None:
  """Fuzz a target, write `result` to the folder and exit."""
  watched = contextlib.nullcontext()
  if guided:
    watched = atheris.instrument_imports(include=_GUIDES)
  with watched:
    target, judge, choices = _modules(name)
  begin = shown = time.monotonic()
  outcomes, count, longest, first_bytes = {}, 0, 0.0, 0

  def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

  def check(data: bytes) -> bool:
    """Judge an input; return True if its outcome is new."""
    nonlocal count, longest, first_bytes, shown
    if count % 100 == 0:
      signal.setitimer(signal.ITIMER_REAL, _HANGS)  # Kills the process.
    start = time.monotonic()
    try:
      outcome = judge.judge(target, target.build(choices.Choices(data)), folder)
      if (seconds := time.monotonic() - start) > longest:
        longest = seconds
        shutil.copy(folder / "input", folder / "slowest")
      if count == _WARM_UP:
        first_bytes = used()
      elif count > _WARM_UP and used() - first_bytes > _BYTES:
        raise judge.Guilty(f"took {used() - first_bytes:,} bytes of memory")
    except BaseException as e:
      print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
      os._exit(1)
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    count += 1
    if count == inputs or time.monotonic() - shown > 10:
      shown = time.monotonic()
      speed = count / (shown - begin)
      print(
        f"{name:8} {count:,}/{inputs:,}  {speed:,.0f} inputs/s"
        f"  ETA {(inputs - count) / speed:,.0f} s"
        f"  longest {longest:.3f} s"
        f"  memory +{max(used() - first_bytes, 0) >> 20} MiB"
        f"  {len(outcomes)} outcomes, {outcomes.get('read', 0):,} read",
        flush=True,
      )
    if count == inputs:
      result = {"inputs": count, "longest": longest, "outcomes": outcomes}
      (folder / "result").write_text(json.dumps(result))
      os._exit(0)
    return outcomes[outcome] == 1

  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  with judge.limited():
    if guided:
      _guided(check, seed)
    _unguided(check, random.Random(seed))


def _guided(check: Callable[[bytes], bool], seed: int) -> None:
  options = (f"-max_len={_LONGEST}", f"-seed={seed}", "-len_control=10")
  quiet = ("-verbosity=0", "-timeout=0", "-rss_limit_mb=0")
  # atheris requires that the callback returns no value.
  atheris.Setup([sys.argv[0], *options, *quiet], lambda data: check(data) and 0)
  atheris.Fuzz()


def _unguided(check: Callable[[bytes], bool], rng: random.Random) -> None:
  known = [b""]
  while True:
    data = bytearray(rng.choice(known))
    for _ in range(rng.randint(1, 8)):
      where = rng.randint(0, len(data))
      data[where : where + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
    data = bytes(data[:_LONGEST])
    if check(data):
      known.append(data)


if __name__ == "__main__":
  sys.exit(main())
