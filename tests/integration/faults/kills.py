r"""Kill training at random times; the resumed run must give equal results.

  PYTHONPATH=.:tests/helpers python tests/integration/faults/kills.py \
      --kills=160 --seed=0

A process is stopped (SIGSTOP) to determine its phase, then killed. Only kills
of a live process count. After each kill the folder must be valid and the exit
code must be the documented one. The run is resumed and killed repeatedly. Its
final parameters, optimizer state and metrics.jsonl must equal those of an
uninterrupted run, bit for bit.
"""

import argparse
import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import tiny_sweep
import trials

from rescalevit_jax.data import dataset

# Norm and accum_steps; few kills use only the first of them.
KINDS = [
  ("Rescale", 1),
  ("BN", 3),
  ("LN", 3),
  ("GN", 1),
  ("Rescale", 3),
  ("BN", 1),
  ("LN", 1),
  ("GN", 3),
  ("Cal", 1),
  ("Fade", 3),
  ("DyT", 1),
  ("BN2", 3),
  ("RMS", 3),
  ("Derf", 1),
  ("DyISRU", 3),
  ("ISRU", 1),
  ("HardTanh", 3),
  ("Arctan", 1),
  ("Softsign", 3),
  ("Linear", 1),
  ("TaperLN", 3),
  ("TaperRMS", 1),
  ("PRepBN", 3),
  ("BHyT", 1),
  ("Center", 3),
]
# More overrides by norm; they cover every feature with state across steps.
_MORE_KEYS = {
  "Cal": (
    "optimizer=muon",
    "base_lr=0.003",
    "ema_decay=0.9",
    "model.sigma_reparam=True",
    "diagnostics_every=3",
    "mixup=0.8",
  ),
  "Fade": ("optimizer=adamw", "base_lr=0.001", "fade.alpha=0.5"),
  "DyT": ("calibration=all", "ema_decay=0.5"),
  "Derf": ("calibration=all", "agc=0.05"),
  "RMS": ("dtype=float16", "ema_decay=0.9"),
  "TaperLN": ("optimizer=adamw", "base_lr=0.001", "ema_decay=0.9"),
  "DyISRU": ("model.alpha_init=calibrated,0.5,calibrated",),
}
_CALIBRATED = ("Cal", "DyT", "Derf", "DyISRU")
PHASES = (
  "start-up",
  "calibration",
  "compilation",
  "training",
  "evaluation",
  "checkpoint",
  "end",
)
# Maximum seconds from the start of a phase to the kill. Kills with phase None
# happen at any time after the start.
_DELAYS = {
  "start-up": 3.0,
  "calibration": 0.5,
  "compilation": 1.0,
  "training": 0.05,
  "evaluation": 0.05,
  "checkpoint": 0.1,
  "end": 0.5,
  None: 6.0,
}
_SIGNALS = (
  ("KILL",),
  ("KILL",),
  ("TERM",),
  ("INT",),
  ("TERM", "TERM"),
  ("INT", "INT"),
  ("TERM", "KILL"),
)
_BEFORE = ("start-up", "calibration")  # Before the training loop.
_CAUGHT = "a second signal stops at once"


@dataclasses.dataclass(frozen=True)
class Kill:
  """A kill of a living process.

  Attributes:
    norm: norm of the model.
    accum_steps: number of micro-batches.
    phase: phase of the run.
    signals: signals sent; the second was sent during saving.
  """

  norm: str
  accum_steps: int
  phase: str
  signals: str


class Killer:
  """Kills runs of one norm and accum_steps.

  Args:
    folder: folder for the runs.
    data_dir: tfds data_dir with the digits.
    norm: norm of the model.
    accum_steps: number of micro-batches.
    rng: selects times and signals.
    env: environment variables of the processes.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    data_dir: pathlib.Path,
    norm: str,
    accum_steps: int,
    rng: random.Random,
    env: Mapping[str, str],
  ):
    self._folder, self._rng = folder, rng
    self._kind = norm, accum_steps
    self._keys = (
      *trials.KEYS,
      f"tfds_data_dir={data_dir}",
      f"model.norm={norm}",
      f"accum_steps={accum_steps}",
      *_MORE_KEYS.get(norm, ()),
    )
    self._env = env
    self._whole = self._trial("whole")
    self._whole.finish()
    self._aims = []

  def kill(self, number: int) -> list[Kill]:
    """Kill and compare runs until `number` kills are done."""
    kills = []
    while len(kills) < number:
      trial = self._trial(f"killed{len(kills)}")
      while len(kills) < number and not self._is_finished(trial):
        if kill := self._kill(trial):
          kills.append(kill)
          print(*dataclasses.astuple(kill), flush=True)
        trials.check_sane(trial, self._whole)
      trial.finish()
      trials.check_same(trial, self._whole)
      shutil.rmtree(trial.workdir)
    return kills

  def _trial(self, name):
    name = "-".join([*map(str, self._kind), name])
    folder = self._folder
    return trials.Trial(
      folder / name, folder / f"{name}.log", self._keys, self._env
    )

  def _is_finished(self, trial):
    return (trial.workdir / "result.json").exists()

  def _kill(self, trial):
    """Start a run and kill it; return None if it finishes first."""
    if not self._aims:  # Each phase once, and one kill at any time.
      self._aims = [*PHASES, None]
      self._aims.remove("calibration")  # Only at the first start.
      self._rng.shuffle(self._aims)
    first = not trial.workdir.exists()
    calibrates = first and self._kind[0] in _CALIBRATED
    aim = "calibration" if calibrates else self._aims.pop()
    signals = self._rng.choice(_SIGNALS)
    lines = trial.metrics().count(b"\n") + self._rng.randrange(6)
    env = {}
    if aim == "compilation":
      env["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(dir=self._folder)
    process = trial.start(**env)
    try:
      return self._kill_process(trial, process, aim, lines, signals)
    finally:
      process.kill()
      process.wait()

  def _kill_process(self, trial, process, aim, lines, signals):
    def begins():
      if aim in (None, "start-up", "calibration", "compilation", "end"):
        return aim is None or _phase(trial) == aim
      enough = trial.metrics().count(b"\n") >= lines
      return enough and _phase(trial) == aim

    trials.wait_for(begins, process)
    time.sleep(self._rng.uniform(0, _DELAYS[aim]))
    if not trials.freeze(process):
      assert process.wait() == 0, trial.said()
      return None
    phase = _phase(trial)
    sent = [signals[0]]
    _send(process, signals[0])
    for name in signals[1:]:
      if trials.wait_for(lambda: _CAUGHT in trial.said(), process):
        trials.wait_for(
          lambda: _temporary(trial) or "stopped at" in trial.said(), process
        )
        time.sleep(self._rng.uniform(0, 0.1))
      if trials.freeze(process):
        _send(process, name)
        sent.append(name)
    _check_exit(process.wait(timeout=120), phase, sent, trial.said())
    return Kill(*self._kind, phase, "+".join(sent))


def main(argv: Sequence[str] | None = None) -> None:
  """Perform the requested number of kills and print a table of them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=160)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--norms", help="those to kill, with commas; all")
  args = parser.parse_args(argv)
  # Background jobs of a shell ignore SIGINT, and so would the runs.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  start = time.monotonic()
  kills = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    dataset.load("digits", str(folder / "tfds"))
    rng = random.Random(args.seed)
    env = tiny_sweep.environment(folder)
    wanted = args.norms and args.norms.split(",")
    kinds = [kind for kind in KINDS if not wanted or kind[0] in wanted]
    for i, (norm, accum_steps) in enumerate(kinds):
      killer = Killer(folder, folder / "tfds", norm, accum_steps, rng, env)
      share = args.kills * (i + 1) // len(kinds) - len(kills)
      kills += killer.kill(share)
  print(_table(kills))
  print(
    f"{len(kills)} kills, seed {args.seed}, {time.monotonic() - start:.0f} s:"
    " all runs the same as uninterrupted ones"
  )


def _table(kills):
  count = collections.Counter
  kinds = count(f"{k.norm}, accum_steps {k.accum_steps}" for k in kills)
  lines = [f"{number:4d}  {kind}" for kind, number in kinds.items()]
  signals = sorted({k.signals for k in kills})
  by = count((k.phase, k.signals) for k in kills)
  lines.append(f"{'':12}" + "".join(f"{s:>11}" for s in [*signals, "all"]))
  for phase in PHASES:
    row = [by[phase, s] for s in signals]
    lines.append(f"{phase:12}" + "".join(f"{n:11d}" for n in [*row, sum(row)]))
  return "\n".join(lines)


def _phase(trial):
  """Return the phase of a run, from its log and metrics."""
  log = trial.said()
  at_end = f"resuming from step {trials.TOTAL_STEPS}\n" in log
  if not at_end and "compiling the training step" not in log:
    return "calibration" if "calibrating norms" in log else "start-up"
  lines = trial.metrics().splitlines(keepends=True)
  last = {"step": 0}
  if lines := [line for line in lines if line.endswith(b"\n")]:
    last = json.loads(lines[-1])
  step, tested = last["step"], "test/loss" in last
  if tested and step == trials.TOTAL_STEPS:
    return "end"
  due = step % trials.EVAL_EVERY == 0 or step == trials.TOTAL_STEPS
  if step and due and not tested:
    return "evaluation"
  if _temporary(trial):
    return "checkpoint"
  if "first step done" not in log:
    return "compilation"
  return "training"


def _temporary(trial):
  """Return True while a checkpoint is being written."""
  folder = trial.workdir / "checkpoints"
  return any(folder.glob("*/*.orbax-checkpoint-tmp"))


def _send(process, name):
  process.send_signal(getattr(signal, f"SIG{name}"))
  process.send_signal(signal.SIGCONT)


def _check_exit(code, phase, sent, log):
  """Check the exit code of a process that was killed."""
  said = code, phase, sent, log
  noted = phase not in (*_BEFORE, "end") and sent[0] != "KILL"
  if sent[-1] == "KILL":
    assert code == -signal.SIGKILL, said
  elif noted and len(sent) == 1:
    assert code == 0, said
    assert "stopped at step" in log or "finished" in log, said
  elif sent[-1] == "TERM":
    assert code in (0, -signal.SIGTERM), said
  else:  # The signal ends Python before `main` handles it.
    assert code in (0, 130, -signal.SIGINT), said
  assert phase in _BEFORE or "Traceback" not in log, said


if __name__ == "__main__":
  main()
