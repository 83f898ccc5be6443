"""Datasets that are folders of image files, one subfolder a class.

PATH/train/CLASS/*.png, PATH/test/CLASS/*.jpg     stored splits
PATH/CLASS/*.png                                  all images are `train`
"""

import dataclasses
import pathlib

from rescalevit_jax import errors
from rescalevit_jax.data import image_files

PREFIX = "folder:"
# Usual names of split folders, and the split that each one holds.
_SPLITS = {
  "train": "train",
  "training": "train",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
  "test": "test",
  "testing": "test",
}


@dataclasses.dataclass(frozen=True)
class FolderExamples:
  """The files of one split, and their class indices."""

  files: list[pathlib.Path]
  labels: list[int]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> tuple[bytes, int]:
    """Return an encoded image and its label."""
    return self.files[index].read_bytes(), self.labels[index]

  def where(self, index: int) -> str:
    """Describe the location of an example."""
    return str(self.files[index])


def open_folder(
  path: pathlib.Path,
) -> tuple[dict[str, FolderExamples], tuple[str, ...]]:
  """Return a folder's examples by split, and its sorted class names.

  Raises:
    UserError: there is no such folder, or it has no class folders, or a class
      has no training images.
  """
  if not path.is_dir():
    raise errors.UserError(f"{path}: no such folder; check dataset")
  folders = _subfolders(path)
  others = [x.name for x in folders if x.name.lower() not in _SPLITS]
  named = [
    (split, x) for x in folders if (split := _SPLITS.get(x.name.lower()))
  ]
  roots = {"train": path}
  if folders and not others:
    roots = {}
    for split, root in named:
      if split in roots:
        raise errors.UserError(
          f"{path}: has two folders for the split {split}; keep one"
        )
      roots[split] = root
  elif any(_subfolders(x) for _, x in named):
    raise errors.UserError(
      f"{path}: {named[0][1].name} is a split's name and {others[0]} is not; if"
      " both are classes, move all classes into a folder named train; if not,"
      f" move {others[0]} elsewhere"
    )
  classes = {split: _subfolders(root) for split, root in roots.items()}
  class_names = sorted({x.name for found in classes.values() for x in found})
  for name in class_names:
    if name.splitlines() != [name]:
      raise errors.UserError(
        f"{path}: the class {name!r} has a line break in its name; rename it"
      )
  if len(class_names) < 2:
    raise errors.UserError(
      f"{path}: has {len(class_names)} class folders; expected"
      " PATH/CLASS/IMAGE or PATH/train/CLASS/IMAGE with at least two classes"
    )
  examples = {}
  for split, found in classes.items():
    if split == "train" and len(found) < len(class_names):
      missing = sorted(set(class_names) - {x.name for x in found})
      raise errors.UserError(
        f"{roots[split]}: lacks the class {missing[0]}, which another split"
        " has; the classes of all splits must be in train"
      )
    files: list[pathlib.Path] = []
    labels: list[int] = []
    for folder in found:
      images = image_files.find(folder)
      if split == "train" and not images:
        raise errors.UserError(
          f"{folder}: has no images; add training images, or remove the class"
          " from all splits"
        )
      files += images
      labels += [class_names.index(folder.name)] * len(images)
    if not files:
      raise errors.UserError(
        f"{roots[split]}: has no image files; expected CLASS/IMAGE in it"
      )
    examples[split] = FolderExamples(files, labels)
  return examples, tuple(class_names)


def _subfolders(path):
  return sorted(
    x for x in path.iterdir() if x.is_dir() and not x.name.startswith(".")
  )
