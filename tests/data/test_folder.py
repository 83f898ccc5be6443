"""Folders of image files as datasets, and splits in tfds' notation."""

import pathlib

import numpy as np
from PIL import Image
import pytest

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import splits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
  """Return the dataset's folder, which does not exist yet."""
  return tmp_path / "d"


def write(root, counts, size=(6, 5)):
  """Write single-color images: red is the number, green the class."""
  for i, (name, count) in enumerate(counts.items()):
    (root / name).mkdir(parents=True)
    for j in range(count):
      Image.new("RGB", size, (j, i, 7)).save(root / name / f"{j:03}.png")


def load(root, **kwargs):
  return dataset_lib.load(f"folder:{root}", None, **kwargs)


@pytest.mark.parametrize("source", ["resident", "streaming"])
@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_split_folders(root, source, test):
  write(root / "train", {"cat": 3, "dog": 4})
  write(root / test, {"cat": 2, "dog": 1})
  found = load(root, source=source)
  assert found.class_names == ("cat", "dog")
  assert found.test_split == ("test" if test == "test" else "validation")
  images, labels = found.train.read(range(7))
  assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
  assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 3]
  assert images.shape == (7, 5, 6, 3)
  assert found.test.read(range(3))[1].tolist() == [0, 0, 1]


def test_class_folders_without_splits_are_training_images(root):
  write(root, {"cat": 10, "dog": 10})
  with pytest.raises(errors.UserError, match=r"data\.num_val"):
    load(root)
  first, again = (load(root, num_val=5) for _ in range(2))
  assert (len(first.train), len(first.test)) == (15, 5)
  np.testing.assert_array_equal(first.test.images, again.test.images)
  assert first.test_split == "train (5 held out)"


def test_slices_of_a_split(root):
  write(root, {"cat": 10, "dog": 10})
  found = load(root, train_split="train[:25%]", test_split="train[-2:]")
  assert found.train.labels.tolist() == [0] * 5
  assert found.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
  assert found.test.images[:, 0, 0, 0].tolist() == [8, 9]
  assert found.test_split == "train[-2:]"
  streamed = load(
    root,
    train_split="train[:25%]+train[75%:]",
    test_split="train[-2:]",
    source="streaming",
  )
  images, labels = streamed.train.read(range(10))
  assert labels.tolist() == [0] * 5 + [1] * 5
  assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
  "notation",
  [
    "nowhere",
    "train[",
    "train[:0%]",
    "train[:200%",
    "train[5:5]",
    "train[5:3]",
    "train[:1shard]",
  ],
)
def test_invalid_splits_are_one_line(notation):
  with pytest.raises(errors.UserError, match="data.train_split") as caught:
    splits.resolve(notation, {"train": 10}, "data.train_split", "d")
  assert len(str(caught.value).splitlines()) == 1


def test_images_of_several_sizes_must_be_resized(root):
  write(root, {"cat": 3, "dog": 3})
  Image.new("RGB", (9, 9)).save(root / "dog" / "big.png")
  with pytest.raises(errors.UserError, match=r"big\.png.*data\.image_size"):
    load(root, num_val=1)
  assert load(root, num_val=1, image_size=4).train.images.shape[1] == 4


def test_a_damaged_first_file_is_named(root):
  write(root, {"cat": 1, "dog": 1})
  for path in root.rglob("*.png"):
    path.write_bytes(b"not an image")
  advice = "or train with data.image_size and data.skip_damaged"
  with pytest.raises(errors.UserError, match=f"cannot be read .*{advice}"):
    load(root, num_val=1)


def test_a_damaged_file_is_named_and_can_be_skipped(root):
  write(root, {"cat": 3, "dog": 3})
  (root / "cat" / "001.png").write_bytes(b"not an image")
  for source in ("resident", "streaming"):
    with pytest.raises(
      errors.UserError,
      match=r"001\.png: cannot be read.*, or train with data\.skip_damaged",
    ):
      load(root, num_val=1, source=source).train.read(range(5))
  found = load(root, num_val=1, skip_damaged=True)
  assert found.num_skipped == 1
  assert len(found.train) + len(found.test) == 5
  again = load(root, num_val=1, skip_damaged=True)  # Uses the cache.
  assert again.num_skipped == 1
  np.testing.assert_array_equal(again.train.images, found.train.images)
  with pytest.raises(errors.UserError, match="data.skip_damaged .* needs"):
    load(root, num_val=1, skip_damaged=True, source="streaming")


def test_an_intact_image_of_another_size_is_not_skipped(root):
  write(root, {"cat": 3, "dog": 3})
  Image.new("RGB", (9, 9)).save(root / "dog" / "big.png")
  # In evaluation, data.image_size cannot change.
  advice = "; resize the files, or train with data.image_size"
  with pytest.raises(errors.UserError, match=rf"big\.png: has shape.*{advice}"):
    load(root, num_val=1, skip_damaged=True)


def test_skipped_images_are_those_of_the_evaluated_split(root, caplog):
  write(root, {f"{x}/{y}": 3 for x in ("train", "test") for y in "ab"})
  for name in ("train/a/000.png", "train/b/000.png", "test/a/002.png"):
    (root / name).write_bytes(b"not an image")
  found = load(root, skip_damaged=True)
  assert (len(found.train), len(found.test), found.num_skipped) == (4, 5, 1)
  assert "left out 2 damaged training images" in caplog.text


def test_a_link_to_a_missing_file_is_an_error(root, tmp_path):
  write(root, {"cat": 3, "dog": 3})
  (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
  before = load(root, num_val=1, skip_damaged=True)
  assert before.num_skipped == 1
  with pytest.raises(errors.UserError, match=r"gone\.png: cannot be read"):
    load(root, num_val=1)
  (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
  after = load(root, num_val=1, skip_damaged=True)
  assert after.num_skipped == 2


@pytest.mark.parametrize("name", ["train/ant", "train/a\rb", "train/cow\n"])
def test_odd_class_folders_are_refused(root, name):
  write(root, {"train/cat": 1, "train/dog": 1, "test/cat": 1})
  (root / name).mkdir()
  with pytest.raises(errors.UserError) as caught:
    load(root)
  assert len(str(caught.value).splitlines()) == 1
  assert ("has no images" in str(caught.value)) == name.endswith("ant")


def test_damaged_test_images_of_eval_dataset_are_counted(root):
  write(root, {"test/cat": 3, "test/dog": 3})
  (root / "test" / "cat" / "001.png").write_bytes(b"not an image")
  for _ in range(2):  # The second load uses the cache.
    test, *_, skipped = dataset_lib.load_test(
      f"folder:{root}", None, skip_damaged=True
    )
    assert (len(test), skipped) == (5, 1)


def test_an_unreadable_file_is_not_reported_as_unprepared(root, monkeypatch):
  write(root, {"cat": 3, "dog": 3})

  read = pathlib.Path.read_bytes

  def read_bytes(path):
    if path.name == "002.png":
      raise PermissionError(13, "Permission denied", str(path))
    return read(path)

  monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
  with pytest.raises(errors.UserError, match=r"002\.png: cannot be read"):
    load(root, num_val=1)


def test_a_changed_file_is_read_again(root):
  write(root, {"cat": 3, "dog": 3})
  load(root, num_val=1)
  Image.new("RGB", (6, 5), (99, 99, 99)).save(root / "cat" / "000.png")
  found = load(root, test_split="train")
  assert found.train.images[0, 0, 0].tolist() == [99, 99, 99]


@pytest.mark.parametrize(
  "layout, words",
  [
    ({}, "0 class folders"),
    ({"cat": 2}, "1 class folders"),
    ({"train/cat": 2, "train/dog": 2, "test/cow": 1}, "lacks the class cow"),
    ({"train/cat": 1, "train/dog": 1, "val/cat": 1, "valid/cat": 1}, "two"),
    ({"train/cat": 1, "train/dog": 1, "test/cat": 0}, "no image files"),
    (
      {"images/cat": 1, "test/cat": 1, "val/cat": 1},
      "test is a split's name and images is not; if both",
    ),
  ],
)
def test_invalid_folder_layouts_are_refused(root, layout, words):
  root.mkdir()
  write(root, layout)
  with pytest.raises(errors.UserError, match=words) as caught:
    load(root, num_val=1)
  assert str(root) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(errors.UserError, match="no such folder"):
    load(tmp_path / "nowhere")
  with pytest.raises(errors.UserError, match="^folder: names no folder"):
    load("")


def test_a_folder_has_no_configs():
  with pytest.raises(errors.UserError, match="a folder has no configs"):
    dataset_lib.expand("folder:/tmp/x/*", None)


@pytest.mark.parametrize("source", ["resident", "streaming"])
def test_a_subset_excludes_validation_images(root, source):
  write(root, {"cat": 10, "dog": 10})
  found = load(root, source=source, num_val=8)
  held_out = {tuple(x) for x in found.test.images[:][:, 0, 0, :2]}
  first = found.train.subset(np.arange(10))
  assert len(first) == 10
  assert not held_out & {tuple(x) for x in first.images[:][:, 0, 0, :2]}


def test_changed_files_behind_links_are_read_again(root, tmp_path):
  write(tmp_path / "files", {"cat": 3, "dog": 3})
  root.mkdir()
  for name in ("cat", "dog"):
    (root / name).symlink_to(tmp_path / "files" / name)
  load(root, test_split="train")
  Image.new("RGB", (6, 5), (99, 0, 7)).save(
    tmp_path / "files" / "cat" / "000.png"
  )
  found = load(root, test_split="train")
  assert found.train.images[:, 0, 0, 0].tolist() == [99, 1, 2, 0, 1, 2]


def test_an_added_class_invalidates_cached_labels(root):
  write(root, {"cat": 2, "dog": 2})
  load(root, test_split="train")
  write(root, {"ant": 1})
  found = load(root, test_split="train")
  assert found.class_names == ("ant", "cat", "dog")
  assert found.train.labels.tolist() == [0, 1, 1, 2, 2]


def test_two_folders_of_a_split_are_refused(root):
  for name in ("train", "Train"):
    write(root / name, {"cat": 1, "dog": 1})
  with pytest.raises(errors.UserError, match="two folders for the split train"):
    load(root, num_val=1)


def test_other_folders_beside_splits_are_refused(root):
  for name in ("train", "test"):
    write(root / name, {"cat": 1, "dog": 1})
  (root / "annotations").mkdir()
  with pytest.raises(errors.UserError, match="annotations"):
    load(root)


def test_classes_may_be_named_like_splits(root):
  write(root, {"invalid": 2, "train": 2, "valid": 1})
  found = load(root, num_val=1)
  assert found.class_names == ("invalid", "train", "valid")


def test_a_split_of_damaged_images_is_refused(root):
  for name in ("cat", "dog"):
    (root / name).mkdir(parents=True)
    (root / name / "a.png").write_bytes(b"")
  with pytest.raises(errors.UserError, match="none of the 2 images"):
    load(root, image_size=4, skip_damaged=True, test_split="train")
  for source in ("resident", "streaming"):
    with pytest.raises(errors.UserError, match=r"\(it is empty\)"):
      load(root, image_size=4, source=source, test_split="train")
