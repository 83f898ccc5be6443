"""Write synthetic datasets of small images for benchmarks."""

import pathlib

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds

_FILE_RECORDS = 10_000


def write(folder: pathlib.Path, count: int) -> None:
  """Write a dataset of small labeled images."""
  folder.mkdir()
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(8, 8, 3)),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
  )
  rng = np.random.default_rng(0)
  examples = [
    features.serialize_example(
      features.encode_example(
        {"image": rng.integers(0, 256, (8, 8, 3), np.uint8), "label": i % 10}
      )
    )
    for i in range(100)
  ]
  name = tfds.core.ShardedFileTemplate(
    dataset_name="synthetic",
    split="train",
    filetype_suffix="array_record",
    data_dir=folder,
  )
  starts = range(0, count, _FILE_RECORDS)
  lengths = [min(_FILE_RECORDS, count - start) for start in starts]
  for i, length in enumerate(lengths):
    path = str(name.sharded_filepath(shard_index=i, num_shards=len(lengths)))
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for j in range(length):
      writer.write(examples[j % len(examples)])
    writer.close()
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        filename_template=name,
      )
    ],
    supervised_keys=("image", "label"),
    check_data=False,
  )
