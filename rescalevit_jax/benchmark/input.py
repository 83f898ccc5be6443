"""Measure the cost of reading from disk for datasets of different sizes.

python -m rescalevit_jax.benchmark.input --output=docs/results/input

Writes datasets of small synthetic images as array_record files with 10,000
images each. Reads batches at distant steps in new processes, with the files in
the page cache. Then decodes synthetic photographs with increasing numbers of
threads. Prints tables; with --output, also writes them and a JSON file.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax.benchmark import synthetic_dataset
from rescalevit_jax.data import dataset
from rescalevit_jax.data import image_files
from rescalevit_jax.data import loader
from rescalevit_jax.data import records
from rescalevit_jax.data import stored
from rescalevit_jax.data import streamed
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import markdown
from rescalevit_jax.runtime import tensorflow_cpu
from rescalevit_jax.runtime import terminal

_ROUNDS = 3  # Results are medians over rounds.
_STEPS = 200  # Timed steps at each position.
_POSITIONS = 3
_PHOTO = (500, 375)  # The most common size in ImageNet, in pixels.


def main(argv: Sequence[str] | None = None) -> int:
  """Run the benchmark; return the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--records",
    type=lambda text: [int(n) for n in text.split(",")],
    default=[10_000, 100_000, 1_000_000, 10_000_000],
    metavar="N,N",
    help="sizes of the datasets (default: 10 thousand to 10 million)",
  )
  parser.add_argument("--batch", type=int, default=128, help="default: 128")
  parser.add_argument(
    "--scratch", help="temporary folder for the datasets, 0.4 KB per record"
  )
  parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(
    lambda: run(args.records, args.batch, args.scratch, args.output)
  )


def run(
  counts: Sequence[int],
  batch: int = 128,
  scratch_dir: str | None = None,
  output: pathlib.Path | None = None,
) -> None:
  """Measure reading and decoding, and print tables.

  Args:
    counts: sizes of the datasets, in records.
    batch: images per batch.
    scratch_dir: temporary folder for the datasets.
    output: folder of input.md and input.json, or None.
  """
  tensorflow_cpu.load()  # Silences the import by tfds.
  found: list[list[dict[str, float]]] = [[] for _ in counts]
  with tempfile.TemporaryDirectory(dir=scratch_dir) as scratch:
    folders = [pathlib.Path(scratch, str(count)) for count in counts]
    for folder, count in zip(folders, counts, strict=True):
      start = time.monotonic()
      synthetic_dataset.write(folder, count)
      print(
        f"{count:,} records written in {time.monotonic() - start:.0f} s",
        file=sys.stderr,
      )
    os.sync()
    # Alternate, which spreads the load of a busy machine evenly.
    for _ in range(_ROUNDS):
      for folder, count, rows in zip(folders, counts, found, strict=True):
        for file in folder.iterdir():  # Fill the page cache.
          file.read_bytes()
        rows.append(_in_new_process(measure, str(folder), count, batch))
  streaming = [
    {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for rows in found
  ]
  decoded = [decode(threads) for threads in _powers_of_2(os.cpu_count() or 1)]
  text = table(streaming, decoded)
  print(text, end="")
  if output is not None:
    output.mkdir(parents=True, exist_ok=True)
    results = {"batch": batch, "streaming": streaming, "decoding": decoded}
    atomic_file.write(output / "input.md", text)
    atomic_file.write(
      output / "input.json", json.dumps(results, indent=2) + "\n"
    )


def measure(folder: str, count: int, batch: int) -> dict[str, float]:
  """Measure reading batches at the start, the middle and the end of a run."""
  mesh = sharding.create_mesh()
  import grain  # noqa: F401 - its import must not be timed.

  start = time.perf_counter()
  builder = tfds.builder_from_directory(folder)
  examples = records.TfdsExamples(builder, "train")
  image, label = records.features(builder)
  split = streamed.StreamedSplit(
    [(examples, range(len(examples)))],
    stored.image_shape(image.shape, image_files.Resize()),
    image_files.Resize(),
    label.num_classes,
  )
  images = loader.Loader(split, mesh)
  opened = time.perf_counter() - start
  planning, first, usual, processor = [], [], [], []

  def plan(step):
    return dataset.batch_indices(0, step, batch, count)

  for position in range(_POSITIONS):
    step = 1 + position * 10 * (count // batch + 1)  # Ten epochs apart.
    start = time.perf_counter()
    for i in range(100):
      plan(step + i)
    planning.append((time.perf_counter() - start) / 100)
    start = time.perf_counter()
    with images.batches(plan, range(step, step + _STEPS)) as batches:
      jax.block_until_ready(next(batches))
      first.append(time.perf_counter() - start)
      begun, begun_processor = time.perf_counter(), time.process_time()
      for found in batches:
        jax.block_until_ready(found)
      usual.append((time.perf_counter() - begun) / (_STEPS - 1))
      used = time.process_time() - begun_processor
      processor.append(used / (_STEPS - 1))
  return {
    "records": count,
    "open_seconds": opened,
    "indices_seconds": statistics.median(planning),
    "first_batch_seconds": first[0],  # Includes opening files.
    "batch_seconds": statistics.median(usual),
    "batch_processor_seconds": statistics.median(processor),
    "peak_memory_bytes": _peak_memory(),
  }


def decode(threads: int) -> dict[str, float]:
  """Measure decoding and resizing photographs in several threads."""
  rng = np.random.default_rng(0)
  # Noise of 8 x 8 pixels yields JPEG files of a typical size.
  small = rng.integers(0, 256, (_PHOTO[1] // 8, _PHOTO[0] // 8, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(small).resize(_PHOTO).save(file, "JPEG", quality=95)

  def read(_):
    with Image.open(io.BytesIO(file.getvalue())) as image:
      image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)

  count = 150 * threads
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(read, range(threads)))
    start, start_processor = time.perf_counter(), time.process_time()
    list(pool.map(read, range(count)))
    seconds = time.perf_counter() - start
    processor = time.process_time() - start_processor
  return {
    "threads": threads,
    "file_bytes": len(file.getvalue()),
    "images_per_second": count / seconds,
    "image_processor_seconds": processor / count,
  }


def table(
  streaming: Iterable[Mapping[str, float]],
  decoding: Iterable[Mapping[str, float]],
) -> str:
  """Return both tables as Markdown.

  Args:
    streaming: results of `measure`, a row each.
    decoding: results of `decode`, a row each.
  """
  read = markdown.table(
    "rrrrrrr",
    [
      "records",
      "open, s",
      "indices of a batch, ms",
      "first batch, s",
      "batch, ms",
      "batch, ms of processor time",
      "peak memory, MB",
    ],
    [
      [
        f"{row['records']:,}",
        f"{row['open_seconds']:.2f}",
        f"{1000 * row['indices_seconds']:.2f}",
        f"{row['first_batch_seconds']:.2f}",
        f"{1000 * row['batch_seconds']:.1f}",
        f"{1000 * row['batch_processor_seconds']:.1f}",
        f"{row['peak_memory_bytes'] / 1e6:.0f}",
      ]
      for row in streaming
    ],
  )
  decoded = markdown.table(
    "rrr",
    ["threads", "photographs/s", "photograph, ms of processor time"],
    [
      [
        f"{row['threads']}",
        f"{row['images_per_second']:.0f}",
        f"{1000 * row['image_processor_seconds']:.1f}",
      ]
      for row in decoding
    ],
  )
  return f"{read}\n{decoded}"


def _in_new_process(function, *args):
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(function, args)


def _peak_memory():
  # getrusage would include the parent's memory.
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))


def _powers_of_2(most: int) -> Iterator[int]:
  number = 1
  while number <= most:
    yield number
    number *= 2


if __name__ == "__main__":
  sys.exit(main())
