r"""Draws and measures what the tokens of trained models attend to.

python -m rescalevit_jax.analysis.plot_attention --workdir=runs/a
python -m rescalevit_jax.analysis.plot_attention --workdir=runs/a \
    --workdir=runs/b --index=7
python -m rescalevit_jax.analysis.plot_attention --npz=ViT-B_16.npz:tanh \
    --image=cat.jpeg

Writes four pictures, as PNG and SVG (tokens: each token to each token, head 0
of blocks 0, 3, 6 and 9; heads: every head of one block; class_token: over the
image, for every block; rollout: through all blocks, residuals included), prints
entropy, share of the diagonal and sparsity of the attention, means over the
test split, and writes them to attention.csv.
"""

import argparse
from collections.abc import Sequence
import csv
import dataclasses
import functools
import io
import logging
import math
import pathlib
import sys
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax import models as models_lib
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.models import norms
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal

_log = logging.getLogger("rescalevit_jax.plot_attention")


def main(argv: Sequence[str] | None = None) -> int:
  """Draws and measures; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workdir", action="append", default=[], help="a run's folder; repeatable"
  )
  parser.add_argument(
    "--npz",
    action="append",
    default=[],
    metavar="FILE[:ARGS]",
    help="a checkpoint file; repeatable. ARGS, what its arrays do not tell: GN,"
    " which look like LN's; tanh for Google's files, whose GELU is not erf; gap"
    " and c=NUMBER for another model.pool and model.residual_c; with commas"
    " between: a.npz:GN,tanh",
  )
  parser.add_argument(
    "--checkpoint",
    choices=("best", "latest"),
    default="best",
    help="of the runs; default: best",
  )
  picture = parser.add_mutually_exclusive_group()
  picture.add_argument("--image", help="an image file to look at")
  picture.add_argument(
    "--index", type=int, default=0, help="of a test image; default: 0"
  )
  parser.add_argument(
    "--dataset",
    help="whose test split is used; default: each run's own, and the first"
    " run's for the picture and for files",
  )
  parser.add_argument(
    "--tfds_data_dir", help="where it lies; default: the runs' own"
  )
  parser.add_argument(
    "--kind",
    action="append",
    choices=list(attention_plots.KINDS),
    help="of picture; repeatable, default: all",
  )
  parser.add_argument(
    "--block", type=int, default=0, help="of the picture of heads; default: 0"
  )
  parser.add_argument(
    "--no_statistics",
    action="store_true",
    help="leave out the pass over the test split",
  )
  parser.add_argument(
    "--batch", type=int, default=32, help="images a step; default: 32"
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    help="folder; default: attention/ in the folder of the first run or file",
  )
  args = parser.parse_args(argv)
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model to look at.

  Attributes:
    model: with its weights.
    path: as given.
    source: name, folder and `data` keys of its data set; None if it is not
      known.
  """

  model: trained_model.TrainedModel
  path: str
  source: tuple[str, str | None, tuple[tuple[str, Any], ...]] | None

  @property
  def test_split(self) -> dataset_lib.Split | None:
    """Of its data set."""
    return None if self.source is None else _test_split(*self.source)


@functools.cache
def _test_split(dataset, folder, keys):
  return dataset_lib.load(dataset, folder, **dict(keys)).test


def _run(args):
  if not args.workdir and not args.npz:
    raise errors.UserError("no model: give --workdir or --npz")
  if args.batch < 1:
    raise errors.UserError(f"--batch: is {args.batch}, but must be > 0")
  subjects = _subjects(args)
  image = args.image
  if image is None:
    image = _test_image(subjects[0], args.index)
  output = args.output
  if output is None:
    path = pathlib.Path(subjects[0].path)
    output = (path if path.is_dir() else path.parent) / "attention"
  models = [subject.model for subject in subjects]
  for kind in args.kind or attention_plots.KINDS:
    figure = attention_plots.draw(kind, models, image, args.block)
    for suffix in (".png", ".svg"):
      plots.save(figure, output / f"{kind}{suffix}")
    _log.info("%s", output / f"{kind}.png")
  if args.no_statistics:
    return
  measured = [subject for subject in subjects if subject.test_split is not None]
  if len(measured) < len(subjects):
    _log.warning("no statistics of files without --dataset")
  if measured:
    _measure(measured, args.batch, output / "attention.csv")


def _subjects(args) -> list[Subject]:
  sources = []
  for workdir in args.workdir:
    config = folder_lib.require_config(workdir)
    sources.append(
      (
        args.dataset or config.dataset,
        args.tfds_data_dir or config.tfds_data_dir,
        tuple(config.data.items()),
      )
    )
  first = (args.dataset, args.tfds_data_dir, ()) if args.dataset else None
  first = sources[0] if sources else first
  subjects = [
    Subject(trained_model.load(workdir, args.checkpoint), workdir, source)
    for workdir, source in zip(args.workdir, sources, strict=True)
  ]
  for reference in args.npz:
    path, said = _parse_reference(reference)
    model = trained_model.load_npz(path, **said)
    if "norm" not in said and model.model.norm == "LN":
      _log.info("%s: taken for LN; write %s:GN if it is GN", path, path)
    subjects.append(Subject(model, path, first))
  names = [subject.model.name for subject in subjects]
  given = [*args.workdir, *args.npz]
  for subject, reference in zip(subjects, given, strict=True):
    if names.count(subject.model.name) > 1:
      subject.model.name = reference
  return subjects


def _parse_reference(reference: str) -> tuple[str, dict[str, Any]]:
  """Parses FILE[:ARGS] into the file and what it says to `load_npz`."""
  path, colon, words = reference.rpartition(":")
  whole = words.endswith(".npz") or pathlib.Path(reference).is_file()
  if not colon or whole:
    return reference, {}
  known = {
    **dict.fromkeys(norms.NORMS, "norm"),
    **dict.fromkeys(models_lib.GELUS, "gelu"),
    **dict.fromkeys(models_lib.POOLS, "pool"),
  }
  said = {}
  for word in filter(None, words.split(",")):
    key, value = known.get(word), word
    if word.startswith("c="):
      key, value = "residual_c", _positive(word.removeprefix("c="))
    if key in said or None in (key, value):
      raise errors.UserError(
        f"--npz: unknown or too many: {word!r} in {reference}; at most one"
        " norm, one GELU, one pool and one c=NUMBER above 0;"
        f" {errors.nearest(word, known)}"
      )
    said[key] = value
  return path, said


def _positive(text):
  """Returns a number above 0; None if the text is none."""
  try:
    return number if 0 < (number := float(text)) < math.inf else None
  except ValueError:
    return None


def _test_image(subject, index):
  split = subject.test_split
  if split is None:
    raise errors.UserError("no image: give --image FILE, or --dataset")
  if not 0 <= index < len(split.images):
    raise errors.UserError(
      f"--index: {index} is not in the test split, which has 0 to"
      f" {len(split.images) - 1}"
    )
  return split.images[index]


def _measure(subjects, batch, path):
  rows = []
  for subject in subjects:
    model, images = subject.model, subject.test_split.images
    found = attention_maps.statistics(model, images, batch)
    for block in range(len(found.entropy)):
      rows.append(
        {
          "model": model.name,
          "path": subject.path,
          "norm": model.model.norm,
          "gelu": model.model.gelu,
          "dataset": subject.source[0],
          "images": found.images,
          "tokens": found.tokens,
          "block": block,
          "entropy_nats": found.entropy[block],
          "diagonal_share": found.diagonal[block],
          "hoyer_sparsity": found.sparsity[block],
        }
      )
  text = io.StringIO()
  table = csv.DictWriter(text, rows[0], lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  atomic_file.write(path, text.getvalue())
  width = max(len(subject.model.name) for subject in subjects)
  print(f"{'':{width}}  norm     block  entropy  diagonal  sparsity")
  for row in rows:
    print(
      f"{row['model']:{width}}  {row['norm']:7}  {row['block']:5}"
      f"  {row['entropy_nats']:7.3f}  {row['diagonal_share']:8.4f}"
      f"  {row['hoyer_sparsity']:8.3f}"
    )
  _log.info("%s", path)


if __name__ == "__main__":
  sys.exit(main())
