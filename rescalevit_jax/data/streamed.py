"""A split whose images stay on disk."""

import bisect
from collections.abc import Sequence
import copy
import itertools

from jaxtyping import Int32, UInt8
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.data import folder
from rescalevit_jax.data import image_files
from rescalevit_jax.data import records

Examples = folder.FolderExamples | records.TfdsExamples


class StreamedSplit:
  """A split that is read and decoded batch by batch; thread-safe.

  Each part has examples, and the range that belongs to the split.
  """

  def __init__(
    self,
    parts: Sequence[tuple[Examples, range]],
    shape: tuple[int, int, int],
    resize: image_files.Resize,
    num_classes: int,
  ):
    self._parts = parts
    lengths = (len(indices) for _, indices in parts)
    self._starts = list(itertools.accumulate(lengths, initial=0))
    self._indices: Sequence[int] | np.ndarray = range(self._starts[-1])
    self._resize = resize
    self._num_classes = num_classes
    self.shape = shape

  def __len__(self) -> int:
    return len(self._indices)

  def subset(self, indices: np.ndarray) -> "StreamedSplit":
    """Return the split of the examples at some indices."""
    part = copy.copy(self)
    part._indices = np.asarray(self._indices)[indices]
    return part

  def read(
    self, indices: Sequence[int] | np.ndarray
  ) -> tuple[UInt8[np.ndarray, "B H W 3"], Int32[np.ndarray, " B"]]:
    """Read the images and labels at some indices.

    Raises:
      UserError: an example is damaged or has no label.
    """
    images = np.empty((len(indices), *self.shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for i, index in enumerate(indices):
      examples, stored = self._locate(int(self._indices[index]))
      try:
        content, label = examples[stored]
        images[i], labels[i] = decode_example(
          content, label, self._resize, self.shape, self._num_classes
        )
      except Exception as e:  # Damaged files raise many types.
        raise error_at(examples.where(stored), e) from e
    return images, labels

  @property
  def images(self) -> "_Images":
    """The images, read on access by an index or a slice."""
    return _Images(self)

  def _locate(self, index):
    part = bisect.bisect_right(self._starts, index) - 1
    examples, stored = self._parts[part]
    return examples, stored[index - self._starts[part]]


class UnlabeledError(errors.UserError):
  """Raised for a split without labels."""


class ShapeError(errors.UserError):
  """Raised for an intact image whose shape differs from the first image's."""


def error_at(where: str, error: Exception) -> errors.UserError:
  """Return the error of one example, with its location."""
  if isinstance(error, UnlabeledError | ShapeError):
    return type(error)(f"{where}: {error}")
  return errors.UserError(
    f"{where}: cannot be read ({errors.brief(error)}); remove or replace it, or"
    " train with data.skip_damaged"
  )


def decode_example(
  content: bytes,
  label: int,
  resize: image_files.Resize,
  shape: tuple[int, int, int],
  num_classes: int,
) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
  """Decode and check an image.

  Raises:
    UnlabeledError: the example has no label.
    ShapeError: the image has another shape.
    Exception: the image is damaged; decoders raise any type.
  """
  if not 0 <= label < num_classes:
    raise UnlabeledError(
      "the example has no label; choose a split with labels (data.test_split,"
      " or eval_split in --mode=eval)"
    )
  pixels = image_files.decode(content, resize)
  if pixels.shape != shape:
    raise ShapeError(
      f"has shape {list(pixels.shape)}, but the first image has"
      f" {list(shape)}; resize the files, or train with data.image_size"
    )
  return pixels, label


class _Images:
  """Images of a split on disk, indexed like an array."""

  def __init__(self, split):
    self._split = split

  def __len__(self):
    return len(self._split)

  def __getitem__(self, item: int | slice) -> np.ndarray:
    picked = range(len(self))[item]
    if isinstance(picked, range):
      return self._split.read(picked)[0]
    return self._split.read([picked])[0][0]
