"""Measures reading from disk: how its cost grows with the data set.

python -m rescalevit_jax.benchmark.input --output=docs/results/input

Writes data sets of small synthetic images as array_record files, 10,000 images
in each, and reads batches of them at steps far apart, in new processes, with
the files in the page cache; then decodes photographs' worth of noise, with
growing numbers of threads. A table goes to standard output; with --output, it
and a JSON file go to a folder.
"""

import argparse
from collections.abc import Iterator, Sequence
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

from array_record.python import array_record_module
import jax
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from rescalevit_jax.data import dataset
from rescalevit_jax.data import loader
from rescalevit_jax.data import records
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import tensorflow_cpu
from rescalevit_jax.runtime import terminal

_ROUNDS = 3  # Figures are their medians.
_STEPS = 200  # Whose time is measured, at each of several places.
_PLACES = 3
_FILE_RECORDS = 10_000
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
    "--scratch", help="where the data sets lie meanwhile, 0.4 KB a record"
  )
  parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
  return cli.run(lambda: _run(parser.parse_args(argv)))


def _run(args):
  terminal.log_to_stderr()
  tensorflow_cpu.load()  # Which tfds imports; quietly.
  found = [[] for _ in args.records]
  with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
    folders = [pathlib.Path(scratch, str(count)) for count in args.records]
    for folder, count in zip(folders, args.records, strict=True):
      start = time.monotonic()
      write(folder, count)
      print(
        f"{count:,} records written in {time.monotonic() - start:.0f} s",
        file=sys.stderr,
      )
    os.sync()
    # In turn, so that a busy machine slows all alike.
    for _ in range(_ROUNDS):
      for folder, count, rows in zip(folders, args.records, found, strict=True):
        for file in folder.iterdir():  # Into the page cache.
          file.read_bytes()
        rows.append(_in_new_process(measure, str(folder), count, args.batch))
  grown = [
    {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for rows in found
  ]
  decoded = [decode(threads) for threads in _powers_of_2(os.cpu_count() or 1)]
  text = table(grown, decoded)
  print(text, end="")
  if args.output is not None:
    args.output.mkdir(parents=True, exist_ok=True)
    found = {"batch": args.batch, "streaming": grown, "decoding": decoded}
    atomic_file.write(args.output / "input.md", text)
    atomic_file.write(
      args.output / "input.json", json.dumps(found, indent=2) + "\n"
    )


def write(folder: pathlib.Path, count: int) -> None:
  """Writes a data set of small images with one label each."""
  folder.mkdir()
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
  starts = range(0, count, _FILE_RECORDS)
  lengths = [min(_FILE_RECORDS, count - start) for start in starts]
  for i, length in enumerate(lengths):
    path = str(name.sharded_filepath(shard_index=i, num_shards=len(lengths)))
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for j in range(length):
      writer.write(examples[j % len(examples)])
    writer.close()
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        filename_template=name,
      )
    ],
    supervised_keys=("image", "label"),
    check_data=False,
  )


def measure(folder: str, count: int, batch: int) -> dict[str, float]:
  """Reads batches at the beginning, in the middle and at the end of a run."""
  mesh = sharding.create_mesh()
  import grain  # noqa: F401 - half a second that data do not cost.

  start = time.perf_counter()
  builder = tfds.builder_from_directory(folder)
  split = records.StreamedSplit(builder, "train", None)
  images = loader.Loader(split, mesh)
  opened = time.perf_counter() - start
  planning, first, usual, processor = [], [], [], []

  def plan(step):
    return dataset.batch_indices(0, step, batch, count)

  for place in range(_PLACES):
    step = 1 + place * 10 * (count // batch + 1)  # Ten epochs later.
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
    "first_batch_seconds": first[0],  # Which opens files.
    "batch_seconds": statistics.median(usual),
    "batch_processor_seconds": statistics.median(processor),
    "peak_memory_bytes": _peak_memory(),
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


def table(grown, decoded) -> str:
  """Returns both tables as Markdown."""
  lines = [
    "| records | opened in s | indices of a batch in ms | first batch in s |"
    " a batch in ms | its processor time in ms | peak memory in MB |",
    "|--:|--:|--:|--:|--:|--:|--:|",
  ]
  lines += [
    f"| {row['records']:,} | {row['open_seconds']:.2f} |"
    f" {1000 * row['indices_seconds']:.2f} | {row['first_batch_seconds']:.2f} |"
    f" {1000 * row['batch_seconds']:.1f} |"
    f" {1000 * row['batch_processor_seconds']:.1f} |"
    f" {row['peak_memory_bytes'] / 1e6:.0f} |"
    for row in grown
  ]
  lines += [
    "",
    "| threads | photographs a second | processor time of one in ms |",
    "|--:|--:|--:|",
  ]
  lines += [
    f"| {row['threads']} | {row['images_per_second']:.0f} |"
    f" {1000 * row['image_processor_seconds']:.1f} |"
    for row in decoded
  ]
  return "\n".join(lines) + "\n"


def _in_new_process(function, *args):
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(function, args)


def _peak_memory():
  # getrusage would count the parent's, too.
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))


def _powers_of_2(most: int) -> Iterator[int]:
  number = 1
  while number <= most:
    yield number
    number *= 2


if __name__ == "__main__":
  sys.exit(main())
