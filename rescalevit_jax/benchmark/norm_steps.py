"""Run single training steps with every norm, in a process of their own.

Usage: python -m rescalevit_jax.benchmark.norm_steps CONFIG ITEMS SECONDS
THREADS, with CONFIG and ITEMS as JSON. An item has `kind`, `norm`, `dtype` and
`attention`. The output has a JSON object per line: the measurements of an item,
or its `error`. An item starts only if the previous items suggest that it ends
within SECONDS.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.benchmark import machine
from rescalevit_jax.benchmark import memory
from rescalevit_jax.benchmark import worker
from rescalevit_jax.distributed import sharding
from rescalevit_jax.sweep import die_with_parent
from rescalevit_jax.training import evaluate
from rescalevit_jax.training import experiment as experiment_lib

IMAGES = 8  # Of a check; the reference on a CPU takes seconds.
OUT_OF_TIME = "out of time"
_CLASSES = 10
_SEED = np.uint32(0)
_TIMED_SECONDS = 1.0
# Concurrent compilations, each with XLA's own threads.
_THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))


def main(config: str, items: str, seconds: str, threads: str) -> None:
  """Run the items, compiling `threads` at a time, and print their results."""
  config = config_lib.from_json(config)
  items, end = json.loads(items), time.monotonic() + float(seconds)
  count, longest = int(threads), 0.0

  def prepare(item):
    of_kind = {"check": prepare_check, "time": prepare_timing}[item["kind"]]
    return _try(lambda: of_kind(item_config(config, item)))

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    for first in range(0, len(items), count):
      start = time.monotonic()
      if start + longest > end:
        break
      # Compile the whole group first; a compilation would slow timed steps.
      for prepared in list(pool.map(prepare, items[first : first + count])):
        found = _try(prepared) if callable(prepared) else prepared
        print(json.dumps(found), flush=True)
      longest = max(longest, time.monotonic() - start)


def _try(function):
  """Call a function; an exception becomes {'error': a line}."""
  try:
    return function()
  except Exception as e:  # XLA and cuDNN raise many types.
    return {"error": f"{type(e).__name__}: {errors.brief(e)}"}


def run(
  config: ml_collections.ConfigDict,
  items: Mapping[str, Mapping[str, str]],
  seconds: float,
  most_seconds: float,
  record: Callable[[str, dict[str, Any]], None],
) -> None:
  """Run items in a subprocess.

  An item that crashes the process is recorded as an error; another process runs
  the remaining items.

  Args:
    config: config of all items, which override parts of it.
    items: items by name.
    seconds: time limit; an item that would exceed it does not start.
    most_seconds: timeout of the process, which may hang.
    record: called with name and result of each item.
  """
  start = time.monotonic()
  left, threads = dict(items), _THREADS
  while left:
    passed = time.monotonic() - start
    command = [
      sys.executable,
      "-m",
      __name__,
      config_lib.to_json(config),
      json.dumps(list(left.values())),
      str(seconds - passed),
      str(threads),
    ]
    with (
      tempfile.TemporaryFile("w+") as log,
      subprocess.Popen(
        die_with_parent.wrap(command),
        env=machine.environment(),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
      ) as process,
      _killing(process, most_seconds - passed),
    ):
      assert process.stdout is not None  # A pipe.
      for line in process.stdout:
        name = next(iter(left))
        del left[name]
        record(name, json.loads(line))
      if process.wait() == 0 or not left:
        return
      log.seek(0)
      lines = log.read().strip().splitlines() or ["it printed nothing"]
    name = next(iter(left))
    if time.monotonic() - start > most_seconds:
      record(name, {"error": OUT_OF_TIME})
      return
    if threads > 1:  # One at a time, to find the item that ends the process.
      threads = 1
      continue
    del left[name]
    record(name, {"error": f"its process ended: {lines[-1]}"})
    threads = _THREADS


@contextlib.contextmanager
def _killing(process, seconds):
  """Kill a process at the end of a block, or after a timeout."""
  timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), process.kill)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    process.kill()


def item_config(
  config: ml_collections.ConfigDict, item: Mapping[str, str]
) -> ml_collections.ConfigDict:
  """Return the config of an item; a check is deterministic, without warm-up."""
  config = config.copy_and_resolve_references()
  config.model.norm = item["norm"]
  config.model.attention = item["attention"]
  config.dtype = item["dtype"]
  if item["kind"] == "check":
    config.batch = config.batch_eval = IMAGES
    config.model.dropout_rate = 0.0
    config.augment.crop = False
    config.warmup_steps = 0
  config_lib.validate(config)
  return config


def prepare_check(
  config: ml_collections.ConfigDict,
) -> Callable[[], dict[str, float]]:
  """Return a function that runs two training steps and an evaluation.

  It is compiled already. Weights and images are from NumPy's generators, which
  are the same for every device and every version of JAX.
  """
  experiment, (images, labels) = _experiment(config)
  state = experiment.init_state()
  weights = _numpy_weights(state.params)
  state = state.replace(
    params=jax.tree.map(sharding.put, weights, experiment.shardings().params)
  )
  step = experiment.train_step(1).lower(state, images, labels, _SEED).compile()
  everything = np.ones(IMAGES, bool)
  evaluation = (
    evaluate.compiled_step(experiment.model, config.image_size, experiment.mesh)
    .lower(state.params, state.batch_stats, images[0], labels[0], everything)
    .compile()
  )

  def run():
    after, first = step(state, images, labels, _SEED)
    after, second = step(after, images, labels, _SEED)
    sums = evaluation(
      after.params, after.batch_stats, images[0], labels[0], everything
    )
    return {
      "loss": float(first["loss"]),
      "grad_norm": float(first["grad_norm"]),
      "second_loss": float(second["loss"]),
      "eval_loss": float(sums["loss"]) / IMAGES,
    }

  return run


def prepare_timing(
  config: ml_collections.ConfigDict,
) -> Callable[[], dict[str, Any]]:
  """Return a function that times a run's training step, compiled already."""
  experiment, (images, labels) = _experiment(config)
  start = time.perf_counter()
  step = (
    experiment.train_step(config.total_steps)
    .lower(experiment.abstract_state(), images, labels, _SEED)
    .compile()
  )
  seconds = time.perf_counter() - start

  def run():
    state, metrics = step(experiment.init_state(), images, labels, _SEED)
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])

    def train(steps):
      nonlocal state
      for _ in range(steps):
        state, metrics = step(state, images, labels, _SEED)
      jax.block_until_ready((state, metrics))

    (times,) = worker.time_laps([train], _TIMED_SECONDS)
    return {
      "loss": loss,
      "grad_norm": grad_norm,
      "finite": math.isfinite(loss + grad_norm),
      **worker.summary(times, config.batch),
      "compile_seconds": seconds,
      "memory_bytes": memory.needed(step),
    }

  return run


def _experiment(config):
  """Return an experiment without a dataset, and a batch of random images."""
  mesh = sharding.create_mesh()
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (1, config.batch, 32, 32, 3), np.uint8)
  labels = np.arange(config.batch, dtype=np.int32)[None] % _CLASSES
  batch = sharding.put((images, labels), sharding.split(mesh, axis=1))
  return experiment_lib.build(config, mesh, _CLASSES), batch


def _numpy_weights(params):
  """Replace matrices by random numbers of NumPy with equal deviation."""
  rng = np.random.default_rng(0)

  def randomize(x):
    x = np.asarray(x)
    if x.ndim < 2:  # Scales, biases, alphas.
      return x
    return rng.standard_normal(x.shape, np.float32) * x.std()

  return jax.tree.map(randomize, params)


if __name__ == "__main__":
  main(*sys.argv[1:])
