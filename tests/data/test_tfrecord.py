import numpy as np
import pytest
import tfrecord_frames

from rescalevit_jax import errors
from rescalevit_jax.data import tfrecord
from rescalevit_jax.runtime import tensorflow_cpu


def random_records(count):
  rng = np.random.default_rng(0)
  return [rng.bytes(n) for n in rng.integers(4, 60, count)]


def test_checksum_has_the_published_check_value():
  assert tfrecord_frames.crc32c(b"123456789") == 0xE3069283
  found = tfrecord.masked_crc32c([memoryview(b"123456789")])
  assert found.tolist() == [tfrecord_frames.masked(0xE3069283)]


def test_reads_all_records_in_order(tmp_path):
  records = random_records(2500)
  (tmp_path / "a").write_bytes(b"".join(map(tfrecord_frames.frame, records)))
  assert [bytes(r) for r in tfrecord.read(tmp_path / "a")] == records


def test_memory_does_not_depend_on_the_longest_record(tmp_path, monkeypatch):
  """Records are padded to one length, in batches of bounded size."""
  records = random_records(200)
  records[50] = bytes(range(256)) * 4
  (tmp_path / "a").write_bytes(b"".join(map(tfrecord_frames.frame, records)))
  sizes = []
  checksums = tfrecord.masked_crc32c

  def observed(batch):
    sizes.append(len(batch) * max(map(len, batch)))
    return checksums(batch)

  monkeypatch.setattr(tfrecord, "masked_crc32c", observed)
  monkeypatch.setattr(tfrecord, "_BATCH_BYTES", 2000)
  assert [bytes(r) for r in tfrecord.read(tmp_path / "a")] == records
  assert max(sizes) <= 2000 and len(sizes) < 20


def test_reads_files_written_by_tensorflow(tmp_path):
  try:
    tf = tensorflow_cpu.load()
  except errors.UserError as e:
    pytest.skip(str(e))
  records = random_records(30)
  with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
    for record in records:
      writer.write(record)
  assert [bytes(r) for r in tfrecord.read(tmp_path / "a")] == records


def test_an_empty_file_has_no_records(tmp_path):
  (tmp_path / "a").touch()
  assert list(tfrecord.read(tmp_path / "a")) == []


@pytest.mark.parametrize("cut", [1, 4, 5, 20, 47])
def test_a_truncated_file_is_an_error(tmp_path, cut):
  file = b"".join(map(tfrecord_frames.frame, (b"x" * 32, b"y" * 32)))
  (tmp_path / "a").write_bytes(file[:-cut])
  with pytest.raises(ValueError, match="truncated"):
    list(tfrecord.read(tmp_path / "a"))


def test_every_changed_bit_of_a_record_is_an_error(tmp_path):
  file = b"".join(map(tfrecord_frames.frame, (b"abcdef", b"ghijk", b"lmnop")))
  start = len(tfrecord_frames.frame(b"abcdef")) + 12
  for bit in range(start * 8, (start + 5 + 4) * 8):
    damaged = bytearray(file)
    damaged[bit // 8] ^= 1 << bit % 8
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
      list(tfrecord.read(tmp_path / "a"))


def test_a_record_too_short_for_an_example_is_an_error(tmp_path):
  (tmp_path / "a").write_bytes(
    tfrecord_frames.frame(b"abcdef") + tfrecord_frames.frame(b"abc")
  )
  with pytest.raises(ValueError, match="3 bytes"):
    list(tfrecord.read(tmp_path / "a"))
