"""Load the models of an analysis, from runs and files, with their datasets."""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import logging
import math
import pathlib
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import resident
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config
from rescalevit_jax.pretrained import detect
from rescalevit_jax.runs import folder as folder_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model to analyze.

  Attributes:
    model: the model.
    path: its folder or file, as given.
    source: name, folder and `data` keys of its dataset; None if unknown.
  """

  model: trained_model.TrainedModel
  path: str
  source: tuple[str, str | None, tuple[tuple[str, Any], ...]] | None

  @property
  def test_split(self) -> resident.Split | None:
    """Test split of its dataset."""
    return None if self.source is None else _test_split(*self.source)


@functools.cache
def _test_split(dataset, folder, keys):
  return dataset_lib.load(dataset, folder, **dict(keys)).test


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
    dataset: dataset of the test split; None for each run's own.
    tfds_data_dir: folder of datasets; None for the runs' own.

  Raises:
    UserError: a model cannot be loaded, or `checkpoint` has no effect.
  """
  if checkpoint and not workdirs:
    raise errors.UserError(
      "--checkpoint: there is no run to take it from; add --workdir, or leave"
      " --checkpoint out"
    )
  sources = []
  for workdir in workdirs:
    config = folder_lib.require_config(workdir)
    sources.append(
      (
        dataset or config.dataset,
        tfds_data_dir or config.tfds_data_dir,
        tuple(_data_keys(config, dataset).items()),
      )
    )
  first = (dataset, tfds_data_dir, ()) if dataset else None
  first = sources[0] if sources else first
  subjects = [
    Subject(trained_model.load(workdir, checkpoint or "best"), workdir, source)
    for workdir, source in zip(workdirs, sources, strict=True)
  ]
  for reference in npz:
    path, options = _parse_reference(reference)
    model = trained_model.load_npz(path, **options)
    norm, *others = detect.same_arrays(model.model.config.norm)
    if "norm" not in options and others:
      _log.info(
        "%s: assuming %s; append the norm if it is %s",
        path,
        norm,
        " or ".join(f":{other}" for other in others),
      )
    subjects.append(Subject(model, path, first))
  names = [subject.model.name for subject in subjects]
  for subject, reference in zip(subjects, [*workdirs, *npz], strict=True):
    if names.count(subject.model.name) > 1:
      subject.model.name = reference
  return subjects


def _data_keys(config, dataset):
  """Return the run's `data` keys, without its own splits for other data."""
  keys = dict(config.data)
  if dataset not in (None, config.dataset):
    for name in ("num_val", "train_split", "test_split"):
      del keys[name]
  return keys


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
  """Load the model that the flags of `add_flags` select.

  Raises:
    UserError: the model cannot be loaded, or a flag has no effect.
  """
  if args.npz:
    return load((), (args.npz,), args.checkpoint)[0].model
  return trained_model.load(args.workdir, args.checkpoint or "best")


def _parse_reference(reference: str) -> tuple[str, dict[str, Any]]:
  """Parse FILE[:ARGS] into the file and keyword arguments of `load_npz`."""
  path, colon, words = reference.rpartition(":")
  whole = words.endswith(".npz") or pathlib.Path(reference).is_file()
  if not colon or whole:
    return reference, {}
  known = {
    **dict.fromkeys(norms.NORMS, "norm"),
    **dict.fromkeys(vit_config.GELUS, "gelu"),
    **dict.fromkeys(vit_config.POOLS, "pool"),
    "convex": "residual",
  }
  options: dict[str, Any] = {}
  for word in filter(None, words.split(",")):
    value: Any = word
    key = known.get(word)
    if word == "depth_scaling":
      key, value = "norm_depth_scaling", True
    name, equals, text = word.partition("=")
    if equals and name in _NUMBERS:
      key, parse = _NUMBERS[name]
      value = _positive(text, parse)
    if key is None or value is None or key in options:
      raise errors.UserError(
        f"--npz: unknown or too many: {word!r} in {reference}; at most one"
        " norm, one GELU, one pool, convex, depth_scaling, and numbers above 0"
        " as in c=NUMBER, eps=NUMBER, groups=NUMBER;"
        f" {errors.nearest(word, known)}"
      )
    options[key] = value
  return path, options


_NUMBERS: dict[str, tuple[str, type]] = {
  "c": ("residual_c", float),
  "eps": ("norm_epsilon", float),
  "groups": ("gn_groups", int),
}


def _positive(text, parse):
  """Return a finite number above 0, or None if the text is not one."""
  try:
    return number if 0 < (number := parse(text)) < math.inf else None
  except ValueError:
    return None
