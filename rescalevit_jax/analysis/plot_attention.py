r"""Draw and measure the attention of trained models.

python -m rescalevit_jax.analysis.plot_attention --workdir=runs/a
python -m rescalevit_jax.analysis.plot_attention --workdir=runs/a \
    --workdir=runs/b --index=7
python -m rescalevit_jax.analysis.plot_attention --npz=ViT-B_16.npz:tanh \
    --image=cat.jpeg

Writes four pictures, as PNG and SVG: tokens (each token to each token, head 0
of blocks 0, 3, 6 and 9), heads (the same for every head of one block),
class_token (class token to image, for every block) and rollout (through all
blocks, including residual connections). Prints entropy, diagonal share and
sparsity of the attention, averaged over the test split, and writes them to
attention.csv.
"""

import argparse
from collections.abc import Iterable, Sequence
import csv
import io
import logging
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import subjects as subjects_lib
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import image_files
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal

_log = logging.getLogger("rescalevit_jax.analysis.plot_attention")


def main(argv: Sequence[str] | None = None) -> int:
  """Draw and measure attention; return the exit code."""
  args = _parser().parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _parser():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    "--workdir", action="append", default=[], help="folder of a run; repeatable"
  )
  add(
    "--npz",
    action="append",
    default=[],
    metavar="FILE[:ARGS]",
    help="a checkpoint file; repeatable. Some options cannot be inferred from"
    " the file; append them, separated by commas: the norm GN, which has the"
    " arrays of LN; tanh for Google's files, whose GELU is not erf; gap,"
    " convex, depth_scaling, c=NUMBER, eps=NUMBER and groups=NUMBER for other"
    " model keys. Example: a.npz:GN,tanh",
  )
  subjects_lib.add_checkpoint_flag(parser)
  picture = parser.add_mutually_exclusive_group()
  picture.add_argument("--image", help="an image file")
  picture.add_argument(
    "--index", type=int, default=0, help="index of a test image (default: 0)"
  )
  add(
    "--dataset",
    help="dataset of the test split (default: each run's own; the first run's"
    " for the image and for checkpoint files)",
  )
  add("--tfds_data_dir", help="folder of datasets (default: the runs' own)")
  add(
    "--kind",
    action="append",
    choices=list(attention_plots.KINDS),
    help="kind of picture; repeatable (default: all)",
  )
  add("--block", type=int, default=0, help="block of the picture heads (0)")
  add(
    "--no_statistics",
    action="store_true",
    help="draw only, without evaluating the test split",
  )
  add("--batch", type=int, default=32, help="images per step (default: 32)")
  add(
    "--output",
    type=pathlib.Path,
    help="output folder (default: attention/ in the folder of the first run or"
    " file)",
  )
  return parser


def _run(args):
  if not args.workdir and not args.npz:
    raise errors.UserError("no model: give --workdir or --npz")
  if args.batch < 1:
    raise errors.UserError(f"--batch: {args.batch} is less than 1; raise it")
  subjects = subjects_lib.load(
    args.workdir, args.npz, args.checkpoint, args.dataset, args.tfds_data_dir
  )
  image = args.image or _test_image(subjects[0], args.index)
  output = args.output
  if output is None:
    path = pathlib.Path(subjects[0].path)
    output = (path if path.is_dir() else path.parent) / "attention"
  models = [subject.model for subject in subjects]
  draw(models, image, output, args.kind or attention_plots.KINDS, args.block)
  if args.no_statistics:
    return
  measured = [subject for subject in subjects if subject.test_split is not None]
  if len(measured) < len(subjects):
    _log.warning("no statistics of files without --dataset")
  if measured:
    measure(measured, args.batch, output / "attention.csv")


def _test_image(subject, index):
  split = subject.test_split
  if split is None:
    raise errors.UserError("no image: give --image FILE, or --dataset")
  if not 0 <= index < len(split.images):
    raise errors.UserError(
      f"--index: {index} is not in the test split; choose one of 0 to"
      f" {len(split.images) - 1}"
    )
  return split.images[index]


def draw(
  models: Sequence[trained_model.TrainedModel],
  image: image_files.Source,
  output: pathlib.Path,
  kinds: Iterable[str] = attention_plots.KINDS,
  block: int = 0,
) -> None:
  """Draw pictures and write them to a folder, as PNG and SVG.

  Args:
    models: the models to draw.
    image: a path, a Pillow image, or a uint8 array [H, W, 3].
    output: the folder; created if missing.
    kinds: kinds of pictures, keys of `attention_plots.KINDS`.
    block: index of the block, for the kind 'heads'.

  Raises:
    UserError: a model has no such block, or the image cannot be read.
  """
  for kind in kinds:
    figure = attention_plots.draw(kind, models, image, block)
    for suffix in (".png", ".svg"):
      plots.save(figure, output / f"{kind}{suffix}")
    _log.info("%s", output / f"{kind}.png")


def measure(
  subjects: Sequence[subjects_lib.Subject], batch: int, path: pathlib.Path
) -> None:
  """Print the attention statistics of models and write them as CSV.

  Args:
    subjects: models with a test split.
    batch: images per step.
    path: the CSV file to write.
  """
  rows = []
  for subject in subjects:
    model, split = subject.model, subject.test_split
    assert split is not None and subject.source is not None
    found = attention_maps.statistics(model, split.images, batch)
    for block in range(len(found.entropy)):
      rows.append(
        {
          "model": model.name,
          "path": subject.path,
          "norm": model.model.config.norm,
          "gelu": model.model.config.gelu,
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
