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

from collections.abc import Sequence
import logging
import pathlib
import sys

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import subjects as subjects_lib
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import csv_text
from rescalevit_jax.runtime import terminal

_log = logging.getLogger("rescalevit_jax.analysis.plot_attention")


def main(argv: Sequence[str] | None = None) -> int:
  """Draw and measure attention; return the exit code."""
  args = _parser().parse_args(cli.arguments(argv))
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args))


def _parser():
  parser = cli.parser(__doc__)
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
    " convex, depth_scaling, c=NUMBER, eps=NUMBER, groups=NUMBER and"
    " logit_cap=NUMBER for other model keys. eps affects only norms that"
    " divide by a standard deviation or a root mean square."
    " Example: a.npz:GN,tanh",
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
  output = args.output
  if output is None:
    path = pathlib.Path(subjects[0].path)
    output = (path if path.is_dir() else path.parent) / "attention"
  _draw(args, subjects, output)
  if args.no_statistics:
    return
  measured = [subject for subject in subjects if subject.test_split is not None]
  if len(measured) < len(subjects):
    _log.warning("no statistics of files without --dataset")
  if measured:
    _measure(measured, args.batch, output / "attention.csv")


def _test_image(subject, first, index):
  """Return an image of the first subject's test split, for a subject."""
  split = subject.test_split_of(first)
  if split is None:
    raise errors.UserError("no image: give --image FILE, or --dataset")
  if not 0 <= index < len(split.images):
    raise errors.UserError(
      f"--index: {index} is not in the test split; choose one of 0 to"
      f" {len(split.images) - 1}"
    )
  return split.images[index]


def _draw(args, subjects, output):
  """Write the pictures to a folder, as PNG and SVG."""
  models = [subject.model for subject in subjects]
  images = [
    args.image or _test_image(subject, subjects[0], args.index)
    for subject in subjects
  ]
  for kind in args.kind or attention_plots.KINDS:
    figure = attention_plots.draw(kind, models, images, args.block)
    for suffix in (".png", ".svg"):
      plots.save(figure, output / f"{kind}{suffix}")
    _log.info("%s", output / f"{kind}.png")


def _measure(subjects, batch, path):
  """Print the statistics of models with a test split; write them as CSV."""
  rows = []
  for subject in subjects:
    model = subject.model
    found = attention_maps.statistics(model, subject.test_split.images, batch)
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
  table = [rows[0].keys(), *map(dict.values, rows)]
  atomic_file.write(path, csv_text.table(table))
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
