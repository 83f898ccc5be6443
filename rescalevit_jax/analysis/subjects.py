"""Load the models of an analysis, from runs and files, with their datasets."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import resident
from rescalevit_jax.data import streamed
from rescalevit_jax.pretrained import untrusted_npz
from rescalevit_jax.runs import folder as folder_lib

Split = resident.Split | streamed.StreamedSplit

_FIRST_RESIZING = ("image_size", "resize", "crop_ratio")


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model to analyze."""

  model: trained_model.TrainedModel
  path: str  # Folder or file, as given.
  # Name, folder and `data` keys of the dataset; None if unknown.
  source: tuple[str, str | None, tuple[tuple[str, Any], ...]] | None

  @property
  def test_split(self) -> Split | None:
    """Test split of its dataset."""
    return None if self.source is None else test_split(*self.source)

  def test_split_of(self, other: "Subject") -> Split | None:
    """Test split of another subject, with this subject's first resizing.

    If the datasets differ, the first resizing is the other's.
    """
    if not self.source or not other.source or self.source[0] != other.source[0]:
      return other.test_split
    name, folder, keys = other.source
    keys = tuple(resized_like(dict(keys), dict(self.source[2])).items())
    return test_split(name, folder, keys)


def resized_like(
  keys: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the `data` keys of a dataset with the first resizing of another."""
  return {**keys, **{k: other[k] for k in _FIRST_RESIZING if k in other}}


@functools.cache
def test_split(
  dataset: str, folder: str | None, keys: tuple[tuple[str, Any], ...]
) -> Split:
  """Load a test split by the dataset's name, folder and `data` keys."""
  options = dict(keys)
  if options.get("num_val"):
    return dataset_lib.load(dataset, folder, **options).test
  return dataset_lib.load_test(dataset, folder, **options)[0]


def load(
  workdirs: Sequence[str],
  npz: Sequence[str],
  checkpoint: str | None = None,
  dataset: str | None = None,
  tfds_data_dir: str | None = None,
) -> list[Subject]:
  """Load models of runs and of checkpoint files, with their datasets.

  Args:
    workdirs: folders of runs.
    npz: checkpoint files, FILE or FILE:ARGS.
    checkpoint: 'best' or 'latest' checkpoint of the runs; None for 'best'.
    dataset: dataset of the test split; None for each run's own, and for the
      first run's with checkpoint files.
    tfds_data_dir: folder of datasets; None for the runs' own.
  """
  if checkpoint and not workdirs:
    raise errors.UserError(
      "--checkpoint: applies to runs only; add --workdir, or leave --checkpoint"
      " out"
    )
  subjects = []
  # All of them first: loading a model takes long.
  configs = [folder_lib.require_config(workdir) for workdir in workdirs]
  files = [npz_model.parse(reference) for reference in npz]
  for path, _ in files:
    untrusted_npz.check_is_file(path)
  for workdir, config in zip(workdirs, configs, strict=True):
    keys = dict(config.data)
    if dataset not in (None, config.dataset):
      for name in ("num_val", "train_split", "test_split"):
        del keys[name]  # Of the run's own dataset.
    source = (
      dataset or config.dataset,
      tfds_data_dir or config.tfds_data_dir,
      tuple(keys.items()),
    )
    model = trained_model.load(workdir, checkpoint or "best")
    subjects.append(Subject(model, workdir, source))
  first = subjects[0].source if subjects else None
  if dataset and not subjects:
    first = (dataset, tfds_data_dir, ())
  for path, options in files:
    subjects.append(Subject(npz_model.load(path, **options), path, first))
  names = [subject.model.name for subject in subjects]
  for subject, reference in zip(subjects, [*workdirs, *npz], strict=True):
    if names.count(subject.model.name) > 1:
      subject.model.name = reference
  return subjects


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags of one model: --workdir or --npz, and --checkpoint."""
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", help="folder of the run")
  source.add_argument(
    "--npz",
    metavar="FILE[:ARGS]",
    help="a checkpoint file; ARGS as in rescalevit_jax.analysis.plot_attention",
  )
  add_checkpoint_flag(parser)


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
  """Add the flag --checkpoint, which is None if it is not given."""
  parser.add_argument(
    "--checkpoint",
    choices=("best", "latest"),
    help="checkpoint of the runs (default: best)",
  )


def load_one(args: argparse.Namespace) -> trained_model.TrainedModel:
  """Load the model that the flags of `add_flags` select."""
  if args.npz:
    return load((), (args.npz,), args.checkpoint)[0].model
  return trained_model.load(args.workdir, args.checkpoint or "best")
