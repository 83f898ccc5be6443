"""Measure one training program; `run_worker` starts a process for each.

Usage: python -m rescalevit_jax.benchmark.worker SUBJECT CONFIG OPTIONS, with
CONFIG and OPTIONS as JSON. The last line of the output is a JSON object.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax.augment import preprocess
from rescalevit_jax.benchmark import comparison
from rescalevit_jax.benchmark import memory
from rescalevit_jax.benchmark import peers
from rescalevit_jax.data import loader
from rescalevit_jax.data import resident
from rescalevit_jax.distributed import sharding
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment as experiment_lib

_MIN_LAPS = 5  # Per function.
_LAP_SECONDS = 0.3  # Shorter if the time does not suffice for _MIN_LAPS.


def main(subject: str, config_json: str, options_json: str) -> None:
  """Measure a program and print the result."""
  config = config_lib.from_json(config_json)
  options = json.loads(options_json)
  if subject == "ours":
    result = measure_ours(config, options)
  else:
    result = measure_peer(peers.PEERS[subject](config), options)
  result["dtype"] = peers.model_of(config).config.dtype
  print(json.dumps(result), flush=True)


def measure_ours(
  config: ml_collections.ConfigDict, options: Mapping[str, float]
) -> dict[str, float]:
  """Measure this project, with real data and with one resident batch."""
  experiment = experiment_lib.create(config)
  seed = np.uint32(config.seed)
  state = experiment.init_state()

  with _batches(experiment, 1) as found:
    images, labels = next(found)
  start = time.perf_counter()
  step = experiment.train_step(config.total_steps)
  compiled = step.lower(state, images, labels, seed).compile()
  seconds = time.perf_counter() - start

  def run(steps):
    # As in `trainer.Trainer`: dispatch a step, then read the metrics of the
    # previous one.
    nonlocal state
    last = None
    with _batches(experiment, steps) as found:
      for images, labels in found:
        state, metrics = compiled(state, images, labels, seed)
        if last is not None:
          jax.device_get(last)
        last = metrics
    jax.block_until_ready((state, metrics))

  on_device = _resident(experiment)
  real_times, resident_times = time_laps([run, on_device], options["seconds"])
  test = experiment.dataset.test
  count = min(len(test), int(options["eval_images"]))
  test = resident.Split(*test.read(range(count)))
  evaluator = evaluate.Evaluator(
    experiment.model,
    loader.Loader(test, experiment.mesh),
    image_size=config.image_size,
    batch=config.batch_eval,
    mesh=experiment.mesh,
  )

  def evaluation(times):
    for _ in range(times):
      evaluator(state.params, state.batch_stats)

  (eval_times,) = time_laps([evaluation], options["seconds"] / 3)
  return {
    **summary(real_times, config.batch),
    "resident_step_seconds": statistics.median(resident_times),
    "input_ratio": comparison.ratio(real_times, resident_times),
    "eval_images_per_second": count / statistics.median(eval_times),
    "compile_seconds": seconds,
    "memory_bytes": memory.used(compiled),
    "peak_flops_per_second": matmul_flops_per_second(
      experiment.model.config.dtype
    ),
    **_diagnostics(experiment, compiled, options["seconds"]),
  }


def _batches(experiment, steps):
  numbers = range(1, steps + 1)
  return experiment.train_loader.batches(experiment.train_indices, numbers)


def _diagnostics(experiment, step, seconds):
  """Return the cost of diagnostics in training steps, if they are enabled."""
  config = experiment.config
  if not config.diagnostics_every:
    return {}
  state = experiment.init_state()
  with _batches(experiment, 1) as found:
    images, labels = next(found)
  programs = diagnostics.CompiledDiagnostics(experiment)
  programs.compile(state, images, labels)

  def run(steps, measure):
    # As in `diagnostics.Diagnostics`.
    nonlocal state
    for _ in range(steps):
      if measure:
        found, before = programs.before_step(state, images, labels)
      state, metrics = step(state, images, labels, np.uint32(config.seed))
      if measure:
        found |= programs.after_step(before, state.params)
        jax.device_get(found)
      jax.device_get(metrics)

  def sharpness(times):
    for _ in range(times):
      jax.device_get(programs.sharpness(state))

  plain, measured, sharp = time_laps(
    [lambda n: run(n, False), lambda n: run(n, True), sharpness], seconds
  )
  measurement = comparison.ratio(measured, plain) - 1
  sharpness_steps = comparison.ratio(sharp, plain)
  every, sharpness_every = config.diagnostics_every, diagnostics.SHARPNESS_EVERY
  return {
    "diagnostics_every": every,
    "sharpness_every": sharpness_every,
    "measurement_steps": measurement,
    "sharpness_steps": sharpness_steps,
    "diagnostics_share": (measurement + sharpness_steps / sharpness_every)
    / every,
  }


def _resident(experiment):
  """Return a function that trains on one batch without augmentation."""
  config = experiment.config.copy_and_resolve_references()
  config.augment.update(dataclasses.asdict(preprocess.Augment(crop=False)))
  config.mixup = config.cutmix = config.label_smoothing = 0.0
  plain = dataclasses.replace(experiment, config=config)
  step, state = plain.train_step(config.total_steps), plain.init_state()
  rng = np.random.default_rng(0)
  size = config.image_size
  shape = (config.accum_steps, config.batch // config.accum_steps)
  images = rng.integers(0, 256, (*shape, size, size, 3), np.uint8)
  labels = rng.integers(0, plain.model.config.num_classes, shape, np.int32)
  batch = sharding.put((images, labels), sharding.split(plain.mesh, axis=1))

  def run(steps):
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, *batch, np.uint32(config.seed))
    jax.block_until_ready((state, metrics))

  return run


def measure_peer(peer: Any, options: Mapping[str, float]) -> dict[str, Any]:
  """Measure a peer, which trains on one resident batch."""
  start = time.perf_counter()
  peer.train(1)
  seconds = time.perf_counter() - start
  (times,) = time_laps([peer.train], options["seconds"])
  (eval_times,) = time_laps([peer.evaluate], options["seconds"] / 3)
  return {
    **summary(times, peer.batch),
    "eval_images_per_second": peer.batch / statistics.median(eval_times),
    "compile_seconds": seconds,
    "memory_bytes": peer.memory_bytes(),
  }


def time_laps(
  runs: Sequence[Callable[[int], None]], seconds: float
) -> list[list[float]]:
  """Return the seconds per step in each lap, for each function.

  Functions take turns, which spreads the load of a busy machine evenly.

  Args:
    runs: functions that run a number of steps and wait for their end.
    seconds: duration of all laps together.
  """
  lap = min(_LAP_SECONDS, seconds / (_MIN_LAPS * len(runs)))
  steps = []
  for run in runs:
    run(2)  # Compiles and warms up.
    start = time.perf_counter()
    run(1)
    single = time.perf_counter() - start
    steps.append(max(1, round(lap / single)))
  times: list[list[float]] = [[] for _ in runs]
  end = time.perf_counter() + seconds
  while time.perf_counter() < end or len(times[0]) < _MIN_LAPS:
    for run, count, found in zip(runs, steps, times, strict=True):
      start = time.perf_counter()
      run(count)
      found.append((time.perf_counter() - start) / count)
  return times


def summary(times: list[float], batch: int) -> dict[str, float]:
  """Return the median and the quartiles of step times, and images/s."""
  low, median, high = statistics.quantiles(times, n=4)
  return {
    "step_seconds": median,
    "step_seconds_low": low,
    "step_seconds_high": high,
    "laps": len(times),
    "images_per_second": batch / median,
  }


def matmul_flops_per_second(dtype: Any) -> float:
  """Return the measured speed of a large product of random matrices."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  multiply = jax.jit(jnp.matmul)

  def run(times):
    for _ in range(times):
      y = multiply(x, x)
    y.block_until_ready()

  (times,) = time_laps([run], 2.0)
  return jax.device_count() * 2 * size**3 / min(times)


if __name__ == "__main__":
  try:
    main(*sys.argv[1:])
  except Exception as e:  # For `run_worker`, as one line.
    sys.exit(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
