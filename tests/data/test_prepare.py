"""The command that prepares datasets by name or from archives."""

import os
import pathlib

import cifar
import pytest
import tensorflow_datasets as tfds

from rescalevit_jax import errors
from rescalevit_jax.data import dataset as dataset_lib
from rescalevit_jax.data import prepare
from rescalevit_jax.data import tfds_builders
from rescalevit_jax.data import untrusted_archive
from rescalevit_jax.runtime import tensorflow_cpu


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Make `prepare` accept small archives; return one of CIFAR-10."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(untrusted_archive, "LAYOUTS", cifar.SMALL)
  return cifar.write(tmp_path / "small", cifar.members(cifar.SMALL10))


def check_data(layout, data_dir):
  dataset = dataset_lib.load(layout.dataset, str(data_dir))
  for split, is_test in ((dataset.train, False), (dataset.test, True)):
    names = [n for n in layout.records if ("test" in n) == is_test]
    expected = [
      (image.tobytes(), label)
      for name in names
      for image, label in zip(
        cifar.images_of(layout, name),
        cifar.labels_of(layout, name)[:, -1].tolist(),
        strict=True,
      )
    ]
    found = zip(
      [image.tobytes() for image in split.images],
      split.labels.tolist(),
      strict=True,
    )
    assert sorted(found) == sorted(expected)


class TestMain:
  def test_archives_are_prepared_once(self, small, tmp_path, capsys):
    try:
      tensorflow_cpu.load()
    except errors.UserError as e:
      pytest.skip(str(e))
    other = cifar.write(tmp_path / "other", cifar.members(cifar.SMALL100))
    out = tmp_path / "new" / "out"
    args = [
      f"--archive={small}",
      f"--archive={other}",
      f"--data_dir={out}",
    ]
    assert prepare.main(args) == 0
    notes = [
      line for line in capsys.readouterr().out.splitlines() if "note" in line
    ]
    assert [small in notes[0], other in notes[1], len(notes)] == [True, True, 2]
    check_data(cifar.SMALL10, out)
    check_data(cifar.SMALL100, out)
    assert sorted(os.listdir(out)) == ["cifar10", "cifar100"]

    assert prepare.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["prepared already" in line for line in lines] == [True, True]
    # The expected checksums are restored.
    url_infos = tfds.builder("cifar10").url_infos
    assert [x.size for x in url_infos.values()] == [170_052_171]

  def test_published_archive_is_accepted_without_a_note(
    self, small, tmp_path, capsys, monkeypatch
  ):
    builder = tfds.builder("cifar10")
    (url,) = builder.url_infos
    found = tfds.download.checksums.compute_url_info(small)
    found.filename = cifar.CIFAR10.archive
    monkeypatch.setitem(builder.url_infos, url, found)
    monkeypatch.setattr(tfds_builders, "prepare", lambda *args, **kwargs: None)
    assert prepare.main([f"--archive={small}", f"--data_dir={tmp_path}"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_one_invalid_archive_stops_all(self, small, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(b"hello")
    out = tmp_path / "out"
    args = [f"--archive={small}", f"--archive={bad}", f"--data_dir={out}"]
    assert prepare.main(args) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith(f"error: {bad}: ")
    assert stderr.count("\n") == 1
    assert not out.exists()

  @pytest.mark.parametrize(
    "failure,code",
    [
      (KeyboardInterrupt(), 130),
      (errors.UserError("no space"), 1),
      (OSError(28, "No space left on device"), 1),
    ],
  )
  def test_failure_leaves_no_files(
    self, small, tmp_path, capsys, monkeypatch, failure, code
  ):
    out = tmp_path / "out"
    seen = []

    def fail(builder, download_dir, manual_dir):
      seen.append(os.path.dirname(manual_dir))
      os.makedirs(download_dir)
      pathlib.Path(download_dir, "half").write_text("x")
      raise failure

    monkeypatch.setattr(tfds_builders, "prepare", fail)
    assert prepare.main([f"--archive={small}", f"--data_dir={out}"]) == code
    assert seen == [str(out)]  # On the file system of the output.
    assert os.listdir(out) == []
    assert capsys.readouterr().err.count("\n") == 1

  def test_unwritable_folder(self, small, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert prepare.main([f"--archive={small}", f"--data_dir={out}"]) == 1
    assert str(out) in capsys.readouterr().err

  def test_dataset_is_prepared_by_name(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = ["--dataset=digits", f"--data_dir={tmp_path}"]
    assert prepare.main(args) == 0
    assert len(dataset_lib.load("digits", str(tmp_path)).test.labels) == 360
    capsys.readouterr()
    assert prepare.main(args) == 0
    assert "digits is prepared already" in capsys.readouterr().out

  @pytest.mark.parametrize(
    "name", ["digit", "", "imdb_reviews", "cats_vs_dogs"]
  )
  def test_unsupported_datasets_are_errors(self, tmp_path, capsys, name):
    assert prepare.main([f"--dataset={name}", f"--data_dir={tmp_path}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert os.listdir(tmp_path) == []

  @pytest.mark.parametrize("args", [[], ["--dataset=digits", "--archive=x"]])
  def test_exactly_one_source_is_required(self, args, capsys):
    with pytest.raises(SystemExit) as raised:
      prepare.main(args)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err
