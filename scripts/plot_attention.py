"""Draws and measures what the tokens of trained models attend to.

python scripts/plot_attention.py --workdir=runs/a
python scripts/plot_attention.py --workdir=runs/a --workdir=runs/b --index=7
python scripts/plot_attention.py --npz=ViT-B_16.npz --image=cat.jpeg

Writes four pictures, as PNG and SVG (tokens: each token to each token, head 0
of blocks 0, 3, 6 and 9; heads: every head of one block; class_token: over the
image, for every block; rollout: through all blocks, residuals included), prints
entropy, share of the diagonal and sparsity of the attention, means over the
test split, and writes them to attention.csv.
"""

import argparse
from collections.abc import Sequence
import csv
import io
import logging
import pathlib
import sys

from rescalevit_jax import attention
from rescalevit_jax import attention_plots
from rescalevit_jax import data
from rescalevit_jax import errors
from rescalevit_jax import experiment
from rescalevit_jax import plots
from rescalevit_jax import progress
from rescalevit_jax import trained
from rescalevit_jax import writers
from rescalevit_jax.models import norms

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
    "--npz", action="append", default=[], help="a checkpoint file; repeatable"
  )
  parser.add_argument(
    "--checkpoint",
    choices=("best", "latest"),
    default="best",
    help="of the runs; default: best",
  )
  parser.add_argument(
    "--norm",
    choices=list(norms.NORMS),
    help="of the .npz files; needed for GN only, whose arrays look like LN's",
  )
  parser.add_argument(
    "--gelu",
    choices=("erf", "tanh"),
    default="erf",
    help="of the .npz files; default: erf, Google's need tanh",
  )
  picture = parser.add_mutually_exclusive_group()
  picture.add_argument("--image", help="an image file to look at")
  picture.add_argument(
    "--index", type=int, default=0, help="of a test image; default: 0"
  )
  parser.add_argument(
    "--dataset", help="whose test split is used; default: the first run's"
  )
  parser.add_argument(
    "--tfds_data_dir", help="where it lies; default: the first run's"
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
  parser.add_argument("--batch", type=int, default=64, help="images a step")
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    help="folder; default: attention/ in the folder of the first run or file",
  )
  args = parser.parse_args(argv)
  progress.log_to_stderr()
  try:
    _run(args)
  except (errors.UserError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("error: interrupted", file=sys.stderr)
    return 130
  return 0


def _run(args):
  if not args.workdir and not args.npz:
    raise errors.UserError("no model: give --workdir or --npz")
  if args.batch < 1:
    raise errors.UserError(f"--batch: is {args.batch}, but must be > 0")
  models = [trained.load(x, args.checkpoint) for x in args.workdir]
  models += [trained.load_npz(x, args.norm, args.gelu) for x in args.npz]
  split = _test_split(args)
  if args.image is not None:
    image = args.image
  elif split is None:
    raise errors.UserError("no image: give --image FILE, or --dataset")
  elif not 0 <= args.index < len(split.images):
    raise errors.UserError(
      f"--index: {args.index} is not in the test split, which has 0 to"
      f" {len(split.images) - 1}"
    )
  else:
    image = split.images[args.index]
  output = args.output
  if output is None:
    folders = [*map(pathlib.Path, args.workdir)]
    folders += [pathlib.Path(x).parent for x in args.npz]
    output = folders[0] / "attention"
  for kind in args.kind or attention_plots.KINDS:
    figure = attention_plots.draw(kind, models, image, args.block)
    for suffix in (".png", ".svg"):
      plots.save(figure, output / f"{kind}{suffix}")
    _log.info("%s", output / f"{kind}.png")
  if args.no_statistics:
    return
  if split is None:
    raise errors.UserError(
      "no test split to measure on: give --dataset, or --no_statistics"
    )
  _measure(models, split, args.batch, output / "attention.csv")


def _test_split(args) -> data.Split | None:
  """The test split, if it is needed and known."""
  if args.image is not None and args.no_statistics:
    return None
  name, data_dir = args.dataset, args.tfds_data_dir
  if args.workdir:
    config = experiment.read_config(args.workdir[0])
    name = name or config.dataset
    data_dir = data_dir or config.tfds_data_dir
  return None if name is None else data.load(name, data_dir).test


def _measure(models, split, batch, path):
  rows = []
  for model in models:
    found = attention.statistics(model, split.images, batch)
    for block in range(len(found.entropy)):
      rows.append(
        {
          "model": model.name,
          "norm": model.model.norm,
          "block": block,
          "entropy_nats": found.entropy[block],
          "diagonal_share": found.diagonal[block],
          "hoyer_sparsity": found.sparsity[block],
          "tokens": found.tokens,
          "images": found.images,
        }
      )
  text = io.StringIO()
  table = csv.DictWriter(text, rows[0], lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  writers.write_file(path, text.getvalue())
  width = max(len(model.name) for model in models)
  print(f"{'':{width}}  norm     block  entropy  diagonal  sparsity")
  for row in rows:
    print(
      f"{row['model']:{width}}  {row['norm']:7}  {row['block']:5}"
      f"  {row['entropy_nats']:7.3f}  {row['diagonal_share']:8.4f}"
      f"  {row['hoyer_sparsity']:8.3f}"
    )
  _log.info("%s: %d test images", path, len(split.images))


if __name__ == "__main__":
  sys.exit(main())
