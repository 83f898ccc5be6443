r"""Classify image files with the model of a run.

  python -m rescalevit_jax.predict --workdir=runs/a cat.png photos/
  python -m rescalevit_jax.predict --workdir=runs/a photos/ --output=a.csv

A folder means all image files in it and its subfolders, by their suffix:
AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WebP. Unreadable files are reported and
skipped. From Python:

  from rescalevit_jax import predict
  model = predict.load("runs/a")
  probabilities = model(["cat.png"])

Exit code: 0 if every image was classified, 1 if not, 2 for an error in the
command line.
"""

from collections.abc import Iterable, Iterator, Sequence
import concurrent.futures
import itertools
import json
import logging
import os
import pathlib
import sys
import time
import unicodedata
import warnings

import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import subjects
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import image_files
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import csv_text
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import progress

_log = logging.getLogger("rescalevit_jax.predict")  # Even as __main__.

_SECONDS_BETWEEN_LINES = 10.0
# Reader threads; each may need the memory of an image of MAX_PIXELS.
_READERS = min(4, os.cpu_count() or 1)
_BIDI_CONTROLS = (
  *("LRE", "RLE", "LRO", "RLO", "PDF"),
  *("LRI", "RLI", "FSI", "PDI"),
)
_WIDEST_NAME = 60  # Longer names shift the columns.

Top = list[tuple[str, float]]

load = trained_model.load


def classify(
  model: trained_model.TrainedModel,
  files: Iterable[pathlib.Path],
  batch: int = 64,
) -> Iterator[tuple[pathlib.Path, np.ndarray | errors.UserError]]:
  """Yield each file with its probabilities [classes], or with the error.

  Threads read the next batch while the device computes; at most two batches of
  `batch` images are in memory.
  """
  pool = concurrent.futures.ThreadPoolExecutor(_READERS)
  unread = iter(files)

  def start_batch():
    paths = itertools.islice(unread, batch)
    return [(path, pool.submit(_read, model, path)) for path in paths]

  try:
    ahead = start_batch()
    while work := ahead:
      ahead = start_batch()
      yield from _results(model, work, batch)
  finally:
    pool.shutdown(cancel_futures=True)


def _read(model, path):
  """Return the model's input, or the error."""
  try:
    return image_files.model_input(path, model.image_size, model.resize)
  except errors.UserError as e:
    return e


def _results(model, work, batch):
  found = [(path, future.result()) for path, future in work]
  inputs = [x for _, x in found if isinstance(x, np.ndarray)]
  rows = iter(model.probabilities(np.stack(inputs), batch) if inputs else ())
  for path, x in found:
    yield path, next(rows) if isinstance(x, np.ndarray) else x


def main(argv: Sequence[str] | None = None) -> int:
  """Classify the files of the command line; return the exit code."""
  args = _parse(argv)
  terminal.log_to_stderr()
  # Pillow warns about odd files; errors are exceptions.
  warnings.filterwarnings("ignore", module="PIL")
  return cli.run(lambda: _run(args))


def _parse(argv):
  parser = cli.parser(__doc__, prog="python -m rescalevit_jax.predict")
  subjects.add_flags(parser)
  parser.add_argument(
    "--top",
    type=cli.positive,
    default=5,
    metavar="N",
    help="classes to print for each image (default: 5)",
  )
  parser.add_argument(
    "--batch",
    type=cli.positive,
    default=64,
    metavar="N",
    help="images per step of the device (default: 64)",
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    metavar="FILE",
    help="a .csv or .json file to write instead of printing",
  )
  parser.add_argument(
    "files", nargs="+", metavar="FILE", help="an image, or a folder of images"
  )
  return parser.parse_args(cli.arguments(argv))


def _run(args):
  if args.output is not None:
    suffix = args.output.suffix.lower()
    if suffix not in _WRITERS:
      raise errors.UserError(
        f"--output: {args.output} ends neither in .csv nor in .json; choose one"
        " of them"
      )
    cli.check_output(args.output)
  files, empty = _find(args.files)
  for name in empty:
    _skip(f"{name}: no images in this folder")
  if not files:
    raise errors.UserError("no images to classify; give image files")
  model = subjects.load_one(args)
  if args.npz:
    head = model.variables["params"]["head"]
    if not model.class_names or not head["kernel"].any():
      raise errors.UserError(
        f"{args.npz}: has no head, or one of zeros as Google's ImageNet-21k"
        " files; fine-tune it to classify images"
      )
  progress.warn_of_idle_gpu()
  widths = [
    min(_WIDEST_NAME, max(len(_one_line(name)) for name in names))
    for names in (map(str, files), model.class_names)
  ]
  rows, skipped = [], 0
  for file, result in _with_progress(model, files, args.batch):
    if isinstance(result, errors.UserError):
      skipped += 1
      _skip(str(result))  # UserErrors begin with the path.
      continue
    top = model.top(result, args.top)
    if args.output is None:
      print(_line(str(file), top, *widths), flush=True)
    else:
      rows.append((_text(str(file)), top))
  if args.output is not None:
    count = min(args.top, len(model.class_names))
    atomic_file.write(args.output, _WRITERS[suffix](rows, count))
    print(f"{args.output}: {len(rows)} images", flush=True)
  problems = [f"{len(empty)} folders have no images"] if empty else []
  if skipped:
    problems.append(f"{skipped} of {len(files)} files could not be classified")
  if problems:
    return cli.fail(f"{', '.join(problems)}, see above")
  return 0


def _find(names):
  """Return the files, and the folders without images."""
  files, empty = [], []
  for name in names:
    path = pathlib.Path(name)
    if not name:
      raise errors.UserError("an empty name is given for a file")
    found = image_files.find(path) if path.is_dir() else [path]
    files += found
    if not found:
      empty.append(name)
  return files, empty


def _skip(reason):
  print(f"skipped: {_one_line(reason)}", file=sys.stderr, flush=True)


def _with_progress(model, files, batch):
  """Yield the results of `classify`; log the progress."""
  batch = min(batch, len(files))
  start = line = None
  for done, found in enumerate(classify(model, files, batch), start=1):
    yield found
    now = time.monotonic()
    if done == batch:  # The first batch includes compilation.
      start = line = now
    elif done > batch and now - line > _SECONDS_BETWEEN_LINES:
      line = now
      speed = (done - batch) / (now - start)
      _log.info(
        "image %d/%d  %.*f images/s  ETA %s",
        done,
        len(files),
        0 if speed >= 10 else 2,
        speed,
        terminal.duration((len(files) - done) / speed),
      )


def _line(name, top, name_width, class_width):
  name = _one_line(name)
  classes = [f"{_one_line(c):<{class_width}} {100 * p:5.1f} %" for c, p in top]
  return "  ".join([f"{name:<{name_width}}", *classes])


def _csv(rows: list[tuple[str, Top]], count: int) -> str:
  header = ["file"]
  for i in range(1, count + 1):
    header += [f"class_{i}", f"probability_{i}"]
  table = [[name, *itertools.chain(*top)] for name, top in rows]
  return csv_text.table([header, *table])


def _json(rows: list[tuple[str, Top]], count: int) -> str:
  del count
  objects = [
    {"file": name, "top": [{"class": c, "probability": p} for c, p in top]}
    for name, top in rows
  ]
  return json.dumps(objects, indent=2, ensure_ascii=False) + "\n"


_WRITERS = {".csv": _csv, ".json": _json}


def _text(name):
  """Escape characters of a file name that have no encoding."""
  return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _one_line(text):
  """Replace line breaks by spaces; escape what would control the terminal."""
  return "".join(
    c.encode("unicode_escape").decode() if _is_control(c) else c
    for c in " ".join(_text(text).splitlines())
  )


def _is_control(c):
  direction = unicodedata.bidirectional(c)
  return unicodedata.category(c) == "Cc" or direction in _BIDI_CONTROLS


if __name__ == "__main__":
  sys.exit(main())
