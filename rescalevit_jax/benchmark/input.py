"""Measure the cost of reading from disk for datasets of different sizes.

python -m rescalevit_jax.benchmark.input --output=docs/results/input

Writes datasets of small synthetic images as array_record files with 10,000
images each. Reads batches at distant steps in new processes, with the files in
the page cache. Then decodes synthetic photographs with increasing numbers of
threads. Prints tables; with --output, also writes them and a JSON file.
"""

from collections.abc import Iterable, Mapping, Sequence
import concurrent.futures
import io
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
from rescalevit_jax.data import image_files
from rescalevit_jax.data import loader
from rescalevit_jax.data import records
from rescalevit_jax.data import streamed
from rescalevit_jax.distributed import sharding
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import markdown
from rescalevit_jax.runtime import tensorflow_cpu
from rescalevit_jax.runtime import terminal

_FILE_RECORDS = 10_000
_ROUNDS = 3  # Results are medians over rounds.
_STEPS = 200  # Timed steps at each position.
_POSITIONS = 3
_PHOTO = (500, 375)  # The most common size in ImageNet, in pixels.

_number = markdown.number


def main(argv: Sequence[str] | None = None) -> int:
  """Run the benchmark; return the exit code."""
  parser = cli.parser(__doc__)
  parser.add_argument(
    "--records",
    type=lambda text: [cli.positive(n) for n in text.split(",")],
    default=[10_000, 100_000, 1_000_000, 10_000_000],
    metavar="N,N",
    help="sizes of the datasets (default: 10 thousand to 10 million)",
  )
  parser.add_argument(
    "--batch", type=cli.positive, default=128, help="default: 128"
  )
  parser.add_argument(
    "--scratch", help="temporary folder for the datasets, 0.4 KB per record"
  )
  parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
  args = parser.parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _run(args):
  tensorflow_cpu.load()  # Silences the import by tfds.
  found = [[] for _ in args.records]
  with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
    folders = [pathlib.Path(scratch, str(count)) for count in args.records]
    for folder, count in zip(folders, args.records, strict=True):
      start = time.monotonic()
      write_dataset(folder, count)
      print(
        f"{count:,} records written in {time.monotonic() - start:.0f} s",
        file=sys.stderr,
      )
    os.sync()
    # Alternate, which spreads the load of a busy machine evenly.
    for _ in range(_ROUNDS):
      for folder, rows in zip(folders, found, strict=True):
        for file in folder.iterdir():  # Fill the page cache.
          file.read_bytes()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
          rows.append(pool.apply(measure, (str(folder), args.batch)))
  streaming = [
    {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for rows in found
  ]
  cores = os.cpu_count() or 1
  decoded = [decode(2**i) for i in range(cores.bit_length())]
  text = table(streaming, decoded)
  print(text, end="")
  if args.output is not None:
    args.output.mkdir(parents=True, exist_ok=True)
    results = {"batch": args.batch, "streaming": streaming, "decoding": decoded}
    atomic_file.write(args.output / "input.md", text)
    atomic_file.write_json(args.output / "input.json", results)


def write_dataset(folder: pathlib.Path, count: int) -> None:
  """Write a synthetic dataset of small labeled images."""
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


def measure(folder: str, batch: int) -> dict[str, float]:
  """Measure reading batches at the start, the middle and the end of a run."""
  mesh = sharding.create_mesh()
  import grain  # noqa: F401 - its import must not be timed.

  start = time.perf_counter()
  builder = tfds.builder_from_directory(folder)
  examples = records.TfdsExamples(builder, "train")
  image, label = records.features(builder)
  split = streamed.StreamedSplit(
    [(examples, range(len(examples)))],
    image.shape,
    image_files.Resize(),
    label.num_classes,
  )
  images = loader.Loader(split, mesh)
  opened = time.perf_counter() - start
  count = len(split)
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
  read = markdown.table_of(
    "rrrrrrr",
    {
      "records": _number("records", "{:,}"),
      "open, s": _number("open_seconds"),
      "indices of a batch, ms": _number("indices_seconds", factor=1000),
      "first batch, s": _number("first_batch_seconds"),
      "batch, ms": _number("batch_seconds", "{:.1f}", 1000),
      "batch, ms of processor time": _number(
        "batch_processor_seconds", "{:.1f}", 1000
      ),
      "peak memory, MB": _number("peak_memory_bytes", "{:.0f}", 1e-6),
    },
    streaming,
  )
  decoded = markdown.table_of(
    "rrr",
    {
      "threads": _number("threads", "{}"),
      "photographs/s": _number("images_per_second", "{:.0f}"),
      "photograph, ms of processor time": _number(
        "image_processor_seconds", "{:.1f}", 1000
      ),
    },
    decoding,
  )
  return f"{read}\n{decoded}"


def _peak_memory():
  # getrusage would include the parent's memory.
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))


if __name__ == "__main__":
  sys.exit(main())
