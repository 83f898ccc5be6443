"""Names of ImageNet's classes, from the files of timm."""

import csv
import importlib.metadata
import logging
import pathlib

_log = logging.getLogger(__name__)

# Number of classes -> WordNet IDs in timm/data/_info. Each version is in the
# order of its IDs. Google's 21,843 are those of the fall 2011 release and two
# more without images (github.com/google-research/big_transfer, issues 7, 18).
_VERSIONS = {
  1000: "imagenet_synsets.txt",
  11821: "imagenet12k_synsets.txt",
  21841: "imagenet22k_synsets.txt",
  21843: "imagenet21k_goog_synsets.txt",
}


def find(num_classes: int) -> list[str] | None:
  """Return the names of an ImageNet head's classes, None if they are unknown.

  The number of classes determines the version.
  """
  if num_classes not in _VERSIONS:
    return None
  # timm.data.ImageNetInfo would import torch, which takes seconds and crashes
  # in a process with TensorFlow.
  try:
    folder = importlib.metadata.distribution("timm").locate_file("timm/data")
    info = pathlib.Path(str(folder)) / "_info"
    ids = (info / _VERSIONS[num_classes]).read_text("utf-8").split()
    with open(info / "imagenet_synset_to_lemma.txt", encoding="utf-8") as f:
      lemmas = dict(csv.reader(f, delimiter="\t"))
  except (importlib.metadata.PackageNotFoundError, OSError):
    _log.info(
      "classes are numbered; for the names of ImageNet: pip install"
      " 'rescalevit-jax[timm]'"
    )
    return None
  _log.info("%d classes: assuming those of ImageNet", num_classes)
  return [lemmas[x] for x in ids]
