"""Open datasets on disk: from tfds, or folders of image files."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from rescalevit_jax import errors
from rescalevit_jax.data import array_cache
from rescalevit_jax.data import folder
from rescalevit_jax.data import image_files
from rescalevit_jax.data import records
from rescalevit_jax.data import tfds_builders


@dataclasses.dataclass(frozen=True)
class StoredDataset:
  """A dataset on disk, with its examples by split.

  `name` is for the log and the cache, `source` is the folder of its files, and
  `shape` is the shape of an image after the first resizing. `files` are the
  files of a folder dataset, whose names determine the labels; None for tfds.
  """

  name: str
  source: str
  examples: dict[str, Any]
  shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  files: Sequence[pathlib.Path] | None = None

  @property
  def sizes(self) -> dict[str, int]:
    """Number of examples by split."""
    return {split: len(x) for split, x in self.examples.items()}

  def cache_folder(self) -> pathlib.Path:
    """Return the folder of the cached arrays."""
    name = self.name.replace("/", "-")
    if self.files is None:
      return array_cache.folder(name, self.source)
    return array_cache.folder(name, self.source, self.files, self.class_names)


def open_dataset(
  name: str, data_dir: str | None, resize: image_files.Resize
) -> StoredDataset:
  """Open a dataset; prepare it first if necessary."""
  if name.startswith(folder.PREFIX):
    return _open_folder(name, resize)
  shape, _ = describe(name, data_dir, resize)
  builder = tfds_builders.open_builder(name, data_dir)
  if not tfds_builders.is_prepared(builder):
    tfds_builders.prepare(builder)
    builder = tfds_builders.open_builder(name, data_dir)
  label = records.features(builder)[1]
  class_names = _class_names(label)
  if len(class_names) != label.num_classes:
    raise errors.UserError(
      f"{builder.data_dir}: damaged, {len(class_names)} class names instead"
      f" of {label.num_classes}; remove this folder to prepare the dataset"
      " again"
    )
  examples = {x: records.TfdsExamples(builder, x) for x in builder.info.splits}
  return StoredDataset(
    builder.info.full_name, str(builder.data_dir), examples, shape, class_names
  )


def is_prepared(name: str, data_dir: str | None) -> bool:
  """Return whether a dataset can be loaded without preparing it."""
  if name.startswith(folder.PREFIX):
    return True
  return tfds_builders.is_prepared(tfds_builders.open_builder(name, data_dir))


def describe(
  name: str, data_dir: str | None, resize: image_files.Resize
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
  """Return the shape of an image and the class names, without preparing."""
  if name.startswith(folder.PREFIX):
    stored = _open_folder(name, resize)
    return stored.shape, stored.class_names
  builder = tfds_builders.open_builder(name, data_dir)
  records.check_features(builder, any_size=resize.image_size is not None)
  image, label = records.features(builder)
  return image_shape(image.shape, resize), _class_names(label)


def _class_names(label):
  return tuple(label.names or map(str, range(label.num_classes)))


def image_shape(
  shape: Sequence[int], resize: image_files.Resize
) -> tuple[int, int, int]:
  """Return the shape of an image after the first resizing."""
  size = resize.image_size
  return (shape[0], shape[1], 3) if size is None else (size, size, 3)


def _open_folder(name, resize):
  location = name.removeprefix(folder.PREFIX)
  if not location:
    raise errors.UserError(f"{name} names no folder; give {name}PATH")
  path = pathlib.Path(location).expanduser()
  examples, class_names = folder.open_folder(path)
  shape = (0, 0, 3)
  if resize.image_size is None:  # Then all images must be like the first one.
    first = next(iter(examples.values()))
    try:
      shape = image_files.decode(first[0][0], resize).shape
    except Exception as e:  # Damaged files raise many types.
      raise errors.UserError(
        f"{first.where(0)}: cannot be read ({errors.brief(e)}); remove it, or"
        " train with data.image_size and data.skip_damaged"
      ) from e
  return StoredDataset(
    path.resolve().name,
    str(path),
    examples,
    image_shape(shape, resize),
    class_names,
    [file for split in examples.values() for file in split.files],
  )
