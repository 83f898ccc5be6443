r"""Measure on a GPU what is worth most, within so many minutes.

  bash scripts/measure_gpu.sh --minutes=15 --data_dir=DIR --output=measurements

Three stages, each a file of --output that is written as soon as a number is
known; summary.md has all of them. The same command goes on with what is left.

norms     one training step of every norm of ViT-B_16: losses in bfloat16 and
          float32 against those that a CPU computed in float32, then time,
          compilation and memory of the recipe's step. Needs no data set.
speed     images/s of training and evaluation, share of the matrix products'
          peak and memory, beside timm and flax where they are installed;
          beside a lower bound with --bounds=compiled.json, which
          rescalevit_jax.benchmark writes with --compile_for.
training  RescaleViT's recipe with its 200 evaluations: ViT-B_32 on CIFAR-10
          with Rescale, LN, BN and GN, the same on CIFAR-100, ViT-B_16 on both,
          then configs/cifar_strong.py. A run starts if by the measured speed
          it ends in time. When none does, the first takes what time is left;
          it saves, and the next call goes on with it.

DIR holds CIFAR as prepared by rescalevit_jax.data.prepare; then neither
TensorFlow nor a network is needed. Exit code: 1 if something failed or a loss
is off.
"""

import argparse
from collections.abc import Sequence
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_report
from rescalevit_jax.benchmark import norm_steps
from rescalevit_jax.benchmark import speed as speed_lib
from rescalevit_jax.runs import run_reader
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.sweep import schedule
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.training import experiment

_log = logging.getLogger("rescalevit_jax.benchmark")

STAGES = ("norms", "speed", "training")
# What a stage may take of the time that is left when it begins, so that each
# call comes to the next one. The last stage may take all of it.
_SHARES = {"norms": 0.35, "speed": 0.5}
_TEST_IMAGES = 10_000  # Of CIFAR, as long as it has not been read.
_OVERTIME = 30.0  # Seconds that a stage's last measurement may take too long.
_SECONDS_TO_SAVE = 20.0  # Of a run that is stopped.
_SECONDS_TO_START = 40.0  # Of a run, besides compilation, at most.


def main(argv: Sequence[str] | None = None) -> int:
  """Measure; return the exit code."""
  args = _parser().parse_args(argv)
  terminal.log_to_stderr()
  # So that the process that measures just now ends with this one.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return cli.run(lambda: _run(args))


def _parser():
  parser = argparse.ArgumentParser(
    prog="measure_gpu.sh",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="scripts/measure_gpu.sh also takes --wheels=DIR: packages to install"
    " first, without a network, for this program alone.",
  )
  add = parser.add_argument
  add("--minutes", type=float, default=15.0, help="default: 15")
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("measurements"),
    metavar="DIR",
    help="a few small files; default: measurements/",
  )
  add(
    "--runs_dir",
    type=pathlib.Path,
    metavar="DIR",
    help="training runs, with their checkpoints; default: runs/ of --output",
  )
  add("--data_dir", metavar="DIR", help="the config key tfds_data_dir")
  add(
    "--stages",
    default=",".join(STAGES),
    metavar="STAGE,...",
    help=f"default: {','.join(STAGES)}",
  )
  add(
    "--bounds",
    type=pathlib.Path,
    metavar="FILE",
    help="compiled.json of rescalevit_jax.benchmark --compile_for",
  )
  add(
    "--rehearse",
    action="store_true",
    help="all of it on the CPU with tiny sizes, on the digits",
  )
  add(
    "--record_reference",
    action="store_true",
    help="do not measure, but compute the float32 losses anew, on the CPU",
  )
  return parser


def _run(args):
  stages = args.stages.split(",")
  for stage in stages:
    if stage not in STAGES:
      raise errors.UserError(
        f"--stages: unknown {stage!r}; {errors.nearest(stage, STAGES)}"
      )
  if not args.minutes > 0:
    raise errors.UserError(f"--minutes: is {args.minutes}, but must be > 0")
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # One, as peers have it.
  if args.rehearse or args.record_reference:
    os.environ["JAX_PLATFORMS"] = "cpu"  # Of the processes that it starts.
  plan = (measure_plan.rehearsal if args.rehearse else measure_plan.real)(
    args.output, args.runs_dir or args.output / "runs", args.data_dir
  )
  if args.record_reference:
    record_reference(plan)
    return 0
  args.output.mkdir(parents=True, exist_ok=True)
  if args.rehearse and not plan.reference.exists():
    record_reference(plan)
  session = Session(plan, args.output, 60 * args.minutes, args.bounds)
  stages = [stage for stage in STAGES if stage in stages]
  return session.run(stages, needs_gpu=not args.rehearse)


def record_reference(plan: measure_plan.Plan) -> None:
  """Compute the losses of all norms in float32 and write them to a file.

  Raises:
    UserError: a step failed.
  """
  config, items = plan.norms
  wanted = {
    name: {**item, "dtype": "float32"}
    for name, item in items.items()
    if (item["kind"], item["dtype"]) == ("check", "bfloat16")
  }
  found = {}

  def record(name, result):
    if "error" in result:
      raise errors.UserError(f"{name}: {result['error']}")
    found[wanted[name]["norm"]] = result
    _log.info("reference %d/%d  %s", len(found), len(wanted), name)

  norm_steps.run(config, wanted, math.inf, math.inf, record)
  reference = {
    **_reference_key(config),
    "jax": importlib.metadata.version("jax"),
    "norms": found,
  }
  atomic_file.write(plan.reference, json.dumps(reference, indent=2) + "\n")
  _log.info("see %s", plan.reference)


def _reference_key(config):
  return {
    "model_name": config.model_name,
    "image_size": config.image_size,
    "images": norm_steps.IMAGES,
  }


class Session:
  """One call of the program.

  Args:
    plan: what to measure.
    output: folder of the results, which must exist.
    seconds: for all of it.
    bounds: file of lower bounds, or None.
  """

  def __init__(
    self,
    plan: measure_plan.Plan,
    output: pathlib.Path,
    seconds: float,
    bounds: pathlib.Path | None,
  ):
    self._plan = plan
    self._output = output
    self._end = time.monotonic() + seconds
    self._bounds = _read_bounds(bounds) if bounds else []
    self._reference = _read_json(plan.reference)
    key = _reference_key(plan.norms[0])
    if any(self._reference.get(name) != key[name] for name in key):
      raise errors.UserError(
        f"{plan.reference}: is not of {key}; --record_reference makes it anew"
      )
    self._results = {
      stage: _read_json(self._path(stage), {}) for stage in STAGES
    }
    self._test_images: dict[str, int] = {}
    self._data_problems: dict[str, str | None] = {}
    self._machine = _read_json(self._path("machine"), None)

  def run(self, stages: Sequence[str], needs_gpu: bool) -> int:
    """Measure what is left of some stages; return the exit code."""
    if self._machine is None:
      machine = speed_lib.machine()
      if needs_gpu and machine["devices"].endswith(" cpu"):
        raise errors.UserError(
          "JAX sees no GPU here; pip install 'jax[cuda13]', or try --rehearse"
        )
      self._machine = machine
      self._write("machine", machine)
    measure = {
      "norms": self._measure_norms,
      "speed": self._measure_speed,
      "training": self._train,
    }
    for stage in stages:
      share = 1.0 if stage == stages[-1] else _SHARES[stage]
      left = self._left(stage)
      _log.info(
        "%s: %d of %d left, at most %s of the %s that are left",
        stage,
        len(left),
        len(self._names(stage)),
        terminal.duration(share * self._seconds()),
        terminal.duration(self._seconds()),
      )
      measure[stage](left, time.monotonic() + share * self._seconds())
    self._write_summary()
    for stage in STAGES:
      _log.info("%s: %s", stage, self._state(stage))
    _log.info("see %s", self._output / "summary.md")
    found = [x for results in self._results.values() for x in results.values()]
    bad = [x for x in found if "error" in x or x.get("within") is False]
    return 1 if bad else 0

  def _measure_norms(self, names, stop):
    config, items = self._plan.norms

    def record(name, found):
      item, norm = items[name], items[name]["norm"]
      reference = self._reference["norms"].get(norm)
      if item["kind"] == "check" and reference and "error" not in found:
        found |= measure_report.compare(found, reference, item["dtype"])
      self._record("norms", name, found, stop)

    norm_steps.run(
      config,
      {name: items[name] for name in names},
      stop - time.monotonic(),
      self._most_seconds(stop),
      record,
    )

  def _measure_speed(self, names, stop):
    for name in names:
      run, subject = self._plan.speed[name]
      package = speed_lib.PEERS.get(subject)
      if package and importlib.util.find_spec(package) is None:
        found = {"left_out": f"{package} is not installed"}
        self._record("speed", name, found, stop)
        continue
      if problem := self._data_problem(run):
        self._record("speed", name, {"error": problem}, stop)
        continue
      taken = [x.get("seconds", 0.0) for x in self._results["speed"].values()]
      start = time.monotonic()
      if start + max(taken, default=0.0) > stop:
        return
      try:
        found = speed_lib.measure(
          run, subject, self._plan.speed_options, self._most_seconds(stop)
        )
        found["seconds"] = time.monotonic() - start
      except subprocess.TimeoutExpired:
        found = {"error": norm_steps.OUT_OF_TIME}
      except errors.UserError as e:
        found = {"error": str(e)}
      self._record("speed", name, found, stop)

  def _train(self, names, stop):
    stop -= _SECONDS_TO_SAVE
    names = list(names)
    while names and time.monotonic() + _SECONDS_TO_START < stop:
      seconds = {name: self._run_seconds(name) for name in names}
      left = stop - time.monotonic()
      in_time = [name for name in names if seconds[name] < left]
      name = (in_time or names)[0]
      names.remove(name)
      run = self._plan.training[name]
      if problem := self._data_problem(run):
        self._record("training", name, {"error": problem}, stop)
        continue
      if math.isfinite(seconds[name]):
        _log.info("%s: about %s", name, terminal.duration(seconds[name]))
      # Of an earlier call, perhaps on a machine whose checkpoints are gone.
      before = self._results["training"].get(name, {})
      store = functools.partial(self._store_run, name, before)
      with _repeating(store):
        outcome = schedule.Schedule(
          [run], [], [{}], (stop, stop + 0.7 * _SECONDS_TO_SAVE)
        ).run()
      found = store()
      if outcome.failed:
        found["error"] = outcome.failed[0][1]
      self._record("training", name, found, stop)
      if outcome.stopped:
        return

  def _store_run(self, name, before):
    """Write down how far a run has come; return that."""
    found = _training_result(self._plan.training[name])
    if found["step"] < before.get("step", 0):
      found = before
    found.pop("error", None)
    self._store("training", name, found)
    return found

  def _run_seconds(self, name):
    """Return about what the rest of a run takes; inf if it is not known."""
    run = self._plan.training[name]
    flat = config_lib.flatten(run.config)
    for other_name, (other, subject) in self._plan.speed.items():
      found = self._results["speed"].get(other_name, {})
      theirs = config_lib.flatten(other.config)
      same = all(
        flat[key] == theirs[key]
        for key in flat
        if key not in ("model.norm", "dataset")
      )
      if subject == "ours" and same and "step_seconds" in found:
        break
    else:
      return math.inf
    steps = run.config.total_steps - subprocess_run.saved_step(run.workdir)
    images = self._test_images.get(run.config.dataset, _TEST_IMAGES)
    evaluation = images / found["eval_images_per_second"]
    return (
      _SECONDS_TO_START
      + 2 * found["compile_seconds"]
      + steps * found["step_seconds"]
      + -(-steps // run.config.eval_every) * evaluation
    )

  def _data_problem(self, run):
    """Return why a run's data set cannot be used, or None."""
    name = run.config.dataset
    if name not in self._data_problems:
      self._data_problems[name] = None
      try:
        # Here and now, so that no run has to decode the images.
        dataset = experiment.load_dataset(run.config)
        self._test_images[name] = len(dataset.test)
      except (errors.UserError, OSError) as e:
        self._data_problems[name] = str(e)
    return self._data_problems[name]

  def _names(self, stage):
    return {
      "norms": self._plan.norms[1],
      "speed": self._plan.speed,
      "training": self._plan.training,
    }[stage]

  def _left(self, stage) -> list[str]:
    """Return the names that are not done, those that failed last."""
    results = self._results[stage]
    names = [x for x in self._names(stage) if not _is_done(results.get(x))]
    return sorted(names, key=lambda name: "error" in results.get(name, {}))

  def _state(self, stage):
    results = self._results[stage].values()
    done = sum(map(_is_done, results))
    failed = sum("error" in x for x in results)
    return f"{done} of {len(self._names(stage))} done, {failed} failed"

  def _seconds(self) -> float:
    return max(0.0, self._end - time.monotonic())

  def _most_seconds(self, stop) -> float:
    """Return when to end what is under way, which may hang."""
    return min(self._seconds(), stop + _OVERTIME - time.monotonic())

  def _store(self, stage, name, found):
    self._results[stage][name] = found
    self._write(stage, self._results[stage])
    self._write_summary()

  def _record(self, stage, name, found, stop):
    """Write a result down and say so."""
    self._store(stage, name, found)
    left = len(self._left(stage))
    _log.info(
      "%s %d/%d  %s: %s  (%s left for this stage)",
      stage,
      len(self._names(stage)) - left,
      len(self._names(stage)),
      name,
      measure_report.brief(found),
      terminal.duration(max(0.0, stop - time.monotonic())),
    )

  def _write_summary(self):
    speed = self._results["speed"]
    text = measure_report.markdown(
      self._machine,
      {stage: self._state(stage) for stage in STAGES},
      self._plan.norms[1],
      self._results["norms"],
      self._reference,
      [
        {"run": run, "subject": subject, "rounds": [speed[name]]}
        for name, (run, subject) in self._plan.speed.items()
        if _is_done(speed.get(name))
      ],
      self._bounds,
      self._plan.training,
      self._results["training"],
      {
        name: x.get("error") or x["left_out"]
        for results in self._results.values()
        for name, x in results.items()
        if "error" in x or "left_out" in x
      },
    )
    atomic_file.write(self._output / "summary.md", text)

  def _path(self, name):
    return self._output / f"{name}.json"

  def _write(self, name, value):
    atomic_file.write(self._path(name), json.dumps(value, indent=1) + "\n")


class _repeating:
  """Call a function again and again while a block runs."""

  _SECONDS = 20.0

  def __init__(self, function):
    self._function = function
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._repeat)

  def _repeat(self):
    while not self._ended.wait(self._SECONDS):
      self._function()

  def __enter__(self):
    self._thread.start()

  def __exit__(self, *exc_info):
    self._ended.set()
    self._thread.join()


def _is_done(found):
  return (
    found is not None
    and not {"error", "left_out"} & found.keys()
    and found.get("finished", True)
  )


def _training_result(run):
  """Return how far a run has come, with its evaluations."""
  try:
    found = run_reader.read(run.workdir)
  except errors.UserError:  # It has not begun.
    return {"finished": False, "step": 0}
  steps, accuracy = found.curve("test/accuracy")
  return {
    "finished": found.is_finished,
    "step": found.step,
    "evaluations": {
      "step": steps,
      "accuracy": accuracy,
      "loss": found.curve("test/loss")[1],
    },
    **(found.result or {}),
  }


def _read_bounds(path):
  try:
    return _read_json(path)["rows"]
  except (KeyError, TypeError) as e:
    raise errors.UserError(
      f"--bounds={path}: has no rows; give compiled.json of --compile_for"
    ) from e


_REQUIRED = object()


def _read_json(path, default=_REQUIRED):
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if default is _REQUIRED:
      raise
    return default
  except ValueError as e:
    raise errors.UserError(f"{path}: damaged ({e}); delete it") from e


if __name__ == "__main__":
  sys.exit(main())
