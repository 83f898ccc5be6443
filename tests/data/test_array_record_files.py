import os
import resource

from array_record.python import array_record_module
import pytest

from rescalevit_jax.data import array_record_files

COUNTS = (3, 1, 1200, 2)


def write(folder, counts):
  paths = []
  for file, count in enumerate(counts):
    paths.append(str(folder / str(file)))
    writer = array_record_module.ArrayRecordWriter(paths[-1], "group_size:1")
    for i in range(count):
      writer.write(f"{file} {i}".encode())
    writer.close()
  return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  return write(tmp_path_factory.mktemp("records"), COUNTS)


def test_records_are_read_in_any_order(paths):
  expected = [
    f"{f} {i}".encode() for f, n in enumerate(COUNTS) for i in range(n)
  ]
  found = array_record_files.ArrayRecordFiles(paths, COUNTS)
  assert len(found) == len(expected)
  assert list(found) == expected
  for i in (1205, 0, 2, 3, 4, 1203, 1204):
    assert found[i] == expected[i]
  with pytest.raises(IndexError):
    found[1206]


def test_list_of_positions_is_not_read(paths, monkeypatch):
  """Reading the list of positions would take time proportional to the file."""
  calls = []

  class Reader:
    def __init__(self, *args, **kwargs):
      self._reader = original(*args, **kwargs)
      self.ok = self._reader.ok

    def read(self, *args):
      calls.append(args)
      return self._reader.read(*args)

  original = array_record_module.ArrayRecordReader
  monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
  assert array_record_files.ArrayRecordFiles(paths, COUNTS)[7] == b"2 3"
  assert calls == [(3, 4)]


def test_an_unreadable_file_reports_the_reason(paths, tmp_path):
  missing = str(tmp_path / "missing")
  found = array_record_files.ArrayRecordFiles([paths[0], missing], [3, 1])
  assert found[2] == b"0 2"
  for _ in range(2):
    with pytest.raises(RuntimeError, match="No such file.*missing"):
      found[3]


def test_more_files_than_the_soft_limit_are_opened(tmp_path):
  used = len(os.listdir("/proc/self/fd"))
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  paths = write(tmp_path, [1] * 50)
  resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))
  try:
    found = array_record_files.ArrayRecordFiles(paths, [1] * 50)
    assert len(list(found)) == 50
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
