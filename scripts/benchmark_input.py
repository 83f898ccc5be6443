"""Measures reading from disk: how its cost grows with the data set.

python scripts/benchmark_input.py --output=docs/results/input

Writes data sets of small synthetic images as array_record, and reads batches
of them at steps far apart; then decodes photographs' worth of noise, with
growing numbers of threads. A table goes to standard output; with --output, it
and a JSON file go to a folder.
"""

import argparse
from collections.abc import Iterator, Sequence
import concurrent.futures
import io
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time

from array_record.python import array_record_module
import jax
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax import data
from rescalevit_jax import feed
from rescalevit_jax import program
from rescalevit_jax import progress
from rescalevit_jax import records
from rescalevit_jax import sharding
from rescalevit_jax import tensorflow_cpu
from rescalevit_jax import writers

_STEPS = 200  # Whose time is measured, at each of several places.
_PLACES = 3
_PHOTO = (500, 375)  # Pixels; of ImageNet's images, the usual size.


def main(argv: Sequence[str] | None = None) -> int:
  """Measures; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--records",
    type=lambda text: [int(n) for n in text.split(",")],
    default=[10_000, 100_000, 1_000_000, 10_000_000],
    metavar="N,N",
    help="sizes of the data sets (default: 10 thousand to 10 million)",
  )
  parser.add_argument("--batch", type=int, default=128, help="default: 128")
  parser.add_argument(
    "--scratch", help="where the data sets lie meanwhile, 0.2 KB a record"
  )
  parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
  return program.run(lambda: _run(parser.parse_args(argv)))


def _run(args):
  progress.log_to_stderr()
  tensorflow_cpu.load()  # Which tfds imports; quietly.
  grown = []
  for count in args.records:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
      start = time.monotonic()
      write(pathlib.Path(folder), count)
      print(
        f"{count:,} records written in {time.monotonic() - start:.0f} s",
        file=sys.stderr,
      )
      grown.append(measure(folder, count, args.batch))
  decoded = [decode(threads) for threads in _powers_of_2(os.cpu_count() or 1)]
  text = table(grown, decoded)
  print(text, end="")
  if args.output is not None:
    args.output.mkdir(parents=True, exist_ok=True)
    found = {"batch": args.batch, "streaming": grown, "decoding": decoded}
    writers.write_file(args.output / "input.md", text)
    writers.write_file(
      args.output / "input.json", json.dumps(found, indent=2) + "\n"
    )


def write(folder: pathlib.Path, count: int) -> None:
  """Writes a data set of small images with one label each."""
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(8, 8, 3)),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
  )
  rng = np.random.default_rng(0)
  examples = [
    features.serialize_example(
      features.encode_example(
        {"image": rng.integers(0, 256, (8, 8, 3), np.uint8), "label": i % 10}
      )
    )
    for i in range(100)
  ]
  name = tfds.core.ShardedFileTemplate(
    dataset_name="synthetic",
    split="train",
    filetype_suffix="array_record",
    data_dir=folder,
  )
  path = str(name.sharded_filepath(shard_index=0, num_shards=1))
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  for i in range(count):
    writer.write(examples[i % len(examples)])
  writer.close()
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name="train",
        shard_lengths=[count],
        num_bytes=os.path.getsize(path),
        filename_template=name,
      )
    ],
    supervised_keys=("image", "label"),
    check_data=False,
  )


def measure(folder: str, count: int, batch: int) -> dict[str, float]:
  """Reads batches at the beginning, in the middle and at the end of a run."""
  start = time.perf_counter()
  builder = tfds.builder_from_directory(folder)
  split = records.StreamedSplit(builder, "train", None)
  images = feed.Feed(split, sharding.create_mesh())
  opened = time.perf_counter() - start
  sorting, first, usual = [], [], []

  def plan(step):
    return data.indices(0, step, batch, count)

  for place in range(_PLACES):
    step = 1 + place * 10 * (count // batch + 1)  # Ten epochs later.
    start = time.perf_counter()
    plan(step)
    sorting.append(time.perf_counter() - start)
    with images.batches(plan, range(step, step + _STEPS)) as batches:
      jax.block_until_ready(next(batches))
      first.append(time.perf_counter() - start)
      begun = time.perf_counter()
      for found in batches:
        jax.block_until_ready(found)
      usual.append((time.perf_counter() - begun) / (_STEPS - 1))
  return {
    "records": count,
    "open_seconds": opened,
    "order_seconds": statistics.median(sorting),
    "first_batch_seconds": statistics.median(first),
    "batch_seconds": statistics.median(usual),
    "peak_memory_bytes": 1024
    * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }


def decode(threads: int) -> dict[str, float]:
  """Decodes and resizes photographs, in several threads."""
  rng = np.random.default_rng(0)
  # Noise of eight pixels: JPEG files of about the size of a photograph's.
  small = rng.integers(0, 256, (_PHOTO[1] // 8, _PHOTO[0] // 8, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(small).resize(_PHOTO).save(file, "JPEG", quality=95)

  def read(_):
    with Image.open(io.BytesIO(file.getvalue())) as image:
      image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)

  count = 150 * threads
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(read, range(threads)))
    start = time.perf_counter()
    list(pool.map(read, range(count)))
    seconds = time.perf_counter() - start
  return {
    "threads": threads,
    "file_bytes": len(file.getvalue()),
    "images_per_second": count / seconds,
  }


def table(grown, decoded) -> str:
  """Returns both tables as Markdown."""
  lines = [
    "| records | opened in s | order of an epoch in s | first batch in s |"
    " a batch in ms | peak memory in MB |",
    "|--:|--:|--:|--:|--:|--:|",
  ]
  lines += [
    f"| {row['records']:,} | {row['open_seconds']:.2f} |"
    f" {row['order_seconds']:.3f} | {row['first_batch_seconds']:.2f} |"
    f" {1000 * row['batch_seconds']:.1f} |"
    f" {row['peak_memory_bytes'] / 1e6:.0f} |"
    for row in grown
  ]
  lines += ["", "| threads | photographs a second |", "|--:|--:|"]
  lines += [
    f"| {row['threads']} | {row['images_per_second']:.0f} |" for row in decoded
  ]
  return "\n".join(lines) + "\n"


def _powers_of_2(most: int) -> Iterator[int]:
  number = 1
  while number <= most:
    yield number
    number *= 2


if __name__ == "__main__":
  sys.exit(main())
